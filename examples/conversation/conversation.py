"""A conversation of two turns: the messages go through the model's own chat template."""

from hayate import LLM, SamplingParams

llm = LLM("smollm2-135m")
params = SamplingParams(max_tokens=40)
messages = [{"role": "system", "content": "You answer in one sentence."}]

for question in ("What is gravity?", "Who described it first?"):
    messages.append({"role": "user", "content": question})
    answer = llm.chat(messages, params)[0].outputs[0].text
    messages.append({"role": "assistant", "content": answer})
    print(f"> {question}\n{answer}\n")
