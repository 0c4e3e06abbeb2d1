"""The fields of config.json that nobody read: harmless ones pass, any other is refused by name."""

from __future__ import annotations

import re

from hayate.checkpoint.config_json import ConfigReader
from hayate.errors import ModelError

# Fields that do not change what a model computes at inference.
_HARMLESS = re.compile(
    r"_.*|architectures|model_type|torch_dtype|dtype|transformers_version|use_cache|auto_map|initializer_range"
    r"|.*dropout|.*_pdrop|output_router_logits|router_aux_loss_coef|router_jitter_noise|output_attentions"
    r"|output_hidden_states|return_dict|id2label|label2id|num_labels|problem_type|task_specific_params"
    r"|finetuning_task|prefix|tokenizer_class|(bos|eos|pad|sep|decoder_start)_token_id|is_decoder"
    r"|chunk_size_feed_forward|is_llama_config|name_or_path|pruned_heads|torchscript|use_bfloat16"
    r"|do_sample|temperature|top_[kp]|max_length|min_length|repetition_penalty|num_beams|max_window_layers"
    r"|use_sliding_window|sliding_window|layer_types|neftune.*|unsloth.*"
)


def refuse_unknown_fields(config: ConfigReader, architecture: str) -> None:
    """ModelError naming the first field of `config` that was neither read nor is harmless."""
    unknown = [key for key in config.unread() if not _HARMLESS.fullmatch(key)]
    if unknown:
        raise ModelError(
            f"{config.where(unknown[0])} is a field hayate does not know for {architecture}; "
            "it may change the model's maths, so it is not ignored"
        )
