"""Continue a prompt three ways: whole, streamed, and several samples with log-probabilities."""

from hayate import LLM, SamplingParams

llm = LLM("smollm2-135m")
prompt = "The capital of France is"

print("whole:", llm.generate(prompt, SamplingParams(max_tokens=8))[0].outputs[0].text)

print("streamed:", end="")
for chunk in llm.stream(prompt, SamplingParams(max_tokens=8)):
    print(chunk.text, end="", flush=True)
print()

params = SamplingParams(n=3, temperature=0.8, top_p=0.95, seed=1, max_tokens=8, logprobs=1)
for sample in llm.generate(prompt, params)[0].outputs:
    logprob = sum(position.token.logprob for position in sample.logprobs)
    print(f"sample {sample.index}: {sample.text!r}, log-probability {logprob:.2f}")
