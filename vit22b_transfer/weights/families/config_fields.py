"""Every field of the configs that are read: used, known to change nothing, or refused.

A field that is in no table may change what a model computes, in a way that nothing here
knows of. So it is refused by name, with the way out.
"""

from collections.abc import Collection, Mapping
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.host.file_errors import brief

Config = Mapping[str, Any]

# Of every class of Hugging Face's: names, labels, and how texts are generated.
_OF_ANY_CLASS = frozenset(
    """
    _name_or_path architectures auto_map dtype torch_dtype model_type preprocessor
    transformers_version _commit_hash _attn_implementation attn_implementation
    _attn_implementation_autoset _attn_implementation_internal
    id2label label2id num_labels _num_labels problem_type finetuning_task
    return_dict output_attentions output_hidden_states output_scores
    return_dict_in_generate torchscript use_bfloat16 tf_legacy_loss use_return_dict
    chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention
    cross_attention_hidden_size tie_encoder_decoder tokenizer_class prefix
    task_specific_params use_cache remove_invalid_values gradient_checkpointing
    max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    bos_token_id pad_token_id eos_token_id sep_token_id decoder_start_token_id
    initializer_range initializer_factor
    """.split()
)
# Dropout and initial values, which are the training's; backbones' stages; what stands
# behind a tower in a whole model.
_OF_ANY_TOWER = _OF_ANY_CLASS | frozenset(
    """
    attention_dropout attention_probs_dropout_prob hidden_dropout_prob dropout
    drop_path_rate projection_dropout layerscale_value layer_scale_init_value
    use_mask_token stage_names out_features out_indices apply_layernorm
    reshape_hidden_states return_class_token tie_word_embeddings projection_dim
    use_flash_attn vision_feature_layer vision_feature_select_strategy
    projector_hidden_act
    """.split()
)
# model_type -> what changes nothing in that class, beside the above.
TOWERS: dict[str, frozenset[str]] = {
    # The pooler and the masked-image decoder are left out.
    "vit": frozenset({"encoder_stride", "pooler_output_size", "pooler_act"}),
    "siglip_vision_model": frozenset({"num_image_tokens", "vocab_size"}),
    "siglip2_vision_model": frozenset({"image_size"}),  # its class counts patches
    "clip_vision_model": frozenset(),
    # Their classes go by mlp_ratio.
    "dinov2": frozenset({"intermediate_size"}),
    "dinov2_with_registers": frozenset({"intermediate_size"}),
    # Changes of the grid while it is trained.
    "dinov3_vit": frozenset(
        {"pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"}
    ),
    "internvl_vision": frozenset(),
    "intern_vit_6b": frozenset(),
}
_PARTS = frozenset({"vision_config", "text_config"})
_PROJECTOR = frozenset(
    "downsample_ratio projector_hidden_act image_seq_length image_token_id".split()
)
# model_type -> fields of a whole model, beside those of its parts.
WHOLES: dict[str, frozenset[str]] = {
    "siglip": _PARTS | {"logit_scale_init_value"},
    "siglip2": _PARTS | {"logit_scale_init_value"},
    "clip": _PARTS | {"logit_scale_init_value"},
    # How images are shown to the text model, of which only the tower is read.
    "internvl": _PARTS | _PROJECTOR,
    "internvl_chat": _PARTS
    | _PROJECTOR
    | frozenset(
        """
        llm_config select_layer template system_message ps_version force_image_size
        dynamic_image_size use_thumbnail min_dynamic_patch max_dynamic_patch
        use_backbone_lora use_llm_lora hidden_size
        """.split()
    ),
    "paligemma": _PARTS
    | frozenset(
        """
        image_token_index image_token_id ignore_index vocab_size _vocab_size
        hidden_size num_image_tokens
        """.split()
    ),
    "gemma3": _PARTS
    | frozenset(
        """
        boi_token_index eoi_token_index image_token_index boi_token_id eoi_token_id
        image_token_id mm_tokens_per_image
        """.split()
    ),
}
_OF_GEMMA = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim rms_norm_eps attention_bias tie_word_embeddings
    use_bidirectional_attention rope_theta rope_scaling rope_parameters
    """.split()
)
_OF_GEMMA_2 = _OF_GEMMA | frozenset(
    """
    hidden_activation query_pre_attn_scalar sliding_window layer_types
    final_logit_softcapping attn_logit_softcapping
    sliding_window_pattern _sliding_window_pattern
    """.split()
)
# The published files of Gemma 2 have them; its class does not read them.
_UNREAD = frozenset({"hidden_act", "sliding_window_size"})
# model_type -> what is used of a text model, or not read by its class.
TEXTS: dict[str, frozenset[str]] = {
    "gemma": _OF_GEMMA | {"hidden_act", "hidden_activation"},
    "gemma2": _OF_GEMMA_2 | _UNREAD,
    "gemma3_text": _OF_GEMMA_2 | {"rope_local_base_freq"},
    "t5": frozenset(
        """
        vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads
        feed_forward_proj layer_norm_epsilon relative_attention_num_buckets
        relative_attention_max_distance tie_word_embeddings scale_decoder_outputs
        dense_act_fn is_gated_act
        """.split()
    ),
}
TEXTS["mt5"] = TEXTS["t5"]
# The text towers of whole models of pairs, by the model_type of their part.
_OF_TEXT_TOWERS = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    hidden_act layer_norm_eps projection_size projection_dim
    """.split()
)
TEXTS |= dict.fromkeys(
    ("siglip_text_model", "siglip2_text_model", "clip_text_model"), _OF_TEXT_TOWERS
)
# Dropout; tables that rotations and relative positions do without; cache formats.
_OF_ANY_TEXT = _OF_ANY_CLASS | frozenset(
    """
    attention_dropout dropout_rate classifier_dropout max_position_embeddings
    n_positions output_past num_image_tokens cache_implementation
    """.split()
)
_TIMM = frozenset("architecture num_classes num_features global_pool".split()) | {
    *("pretrained_cfg", "preprocessor", "model_args")
}
_TIMM_TRANSFORM = frozenset(
    """
    input_size interpolation crop_pct crop_mode mean std
    tag custom_load test_input_size test_crop_pct fixed_input_size min_input_size
    num_classes pool_size first_conv classifier head_bias source architecture url file
    hf_hub_id hf_hub_filename hf_sha notes license description origin_url paper_name
    paper_ids state_dict label_offset label_names label_descriptions
    pretrained_tag
    """.split()
)
# What the tensors show.
_TIMM_SIZES = frozenset(
    """
    in_chans img_size patch_size embed_dim depth num_heads mlp_ratio num_classes
    global_pool class_token pre_norm dynamic_img_size drop_rate drop_path_rate
    """.split()
)


# Steps that no table has a use for, and what they are where they are left out.
_LEFT_OUT = {"pad2square": False}


def check_tower(config: Config, kind: str, used: Collection[str]) -> None:
    """Raises UserError for a field of a tower's config that no table has."""
    _check(config, "config.json", _OF_ANY_TOWER | _of(TOWERS, kind) | frozenset(used))


def check_text(config: Config, kind: str) -> None:
    """Raises UserError for a field of a text model's config that no table has."""
    _check(config, "config.json", _OF_ANY_TEXT | _of(TEXTS, kind))


def check_whole(config: Config) -> None:
    """Raises UserError for a field of a model of several parts that no table has."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in WHOLES:  # else only its tower is meant
        known = _OF_ANY_TOWER | _OF_ANY_TEXT | WHOLES[kind]
        _check(config, "config.json", known)


def check_timm(config: Config) -> None:
    """Raises UserError for a field of timm's config.json that no table has."""
    _check(config, "config.json", _TIMM)
    for name, known in (
        ("pretrained_cfg", _TIMM_TRANSFORM),
        ("model_args", _TIMM_SIZES),
    ):
        part = config.get(name)
        if isinstance(part, Mapping):
            _check(part, f"{name} of config.json", known)


def _of(table: Mapping[str, frozenset[str]], kind: Any) -> frozenset[str]:
    if not isinstance(kind, str) or kind not in table:
        raise UserError(
            f"config.json says model_type = {brief(kind)}; known are "
            f"{', '.join(sorted(table))}."
        )
    return table[kind]


def _check(config: Config, where: str, known: Collection[str]) -> None:
    for name, value in config.items():
        # Nothing is said by these; an older file has many of them.
        if name in known or value is None or value in ({}, []):
            continue
        if name in _LEFT_OUT and value == _LEFT_OUT[name]:
            continue
        raise UserError(
            f"{where} says {brief(name)} = {brief(value)}, a field that is not known "
            "here: it may change what the model computes. If it does not, remove it "
            "from the file and import again."
        )
