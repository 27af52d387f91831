"""Models of transformers, made small: one class and one call of each family, with random weights from its config."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

logging.getLogger("transformers").setLevel(logging.ERROR)

Inputs = dict[str, Any]

# What a config is made small by, where it has such a field.
SMALL: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 64),
    **dict.fromkeys(("ffn_hidden_size", "hidden_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k"), 2),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "vocab_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
    "projection_dim": 16,
    "state_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}


def small(kind: type[Any], changes: Mapping[str, Any]) -> Any:
    """A config of this class with few and narrow layers, and nothing random."""
    default = kind()
    values: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        part = getattr(default, name, None)
        if isinstance(part, transformers.PretrainedConfig):
            values[name] = small(type(part), changes.get(name, {})).to_dict()
        elif "drop" in name and isinstance(value, float):
            values[name] = 0.0
        elif name in SMALL and (isinstance(value, int) or (value is None and name in ("head_dim", "num_labels"))):
            values[name] = SMALL[name]
    if hasattr(default, "num_labels"):
        values["num_labels"] = 3
    values |= {name: value for name, value in changes.items() if not isinstance(value, Mapping) or name not in values}
    return kind(**values)


@dataclass(frozen=True)
class Family:
    """One class of transformers: how its config is made small, and what it is called with."""

    name: str
    kind: str
    inputs: Callable[[Any], Inputs]
    config: Mapping[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = ("train", "eval")

    def make(self) -> tuple[nn.Module, Inputs]:
        """The model with weights of seed 0, in train mode, and its inputs."""
        torch.manual_seed(0)
        cls = getattr(transformers, self.name)
        config = small(cls.config_class, self.config)
        config._attn_implementation = "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"
        model = cls(config).train()
        for module in model.modules():  # what a config does not name
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        return model, self.inputs(model)


BATCH, LENGTH = 2, 8


def ids(size: int = 90, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, size, (BATCH, length))


def mask(length: int = LENGTH) -> torch.Tensor:
    """The second sample is padded."""
    rows = torch.ones(BATCH, length, dtype=torch.int64)
    rows[1, length - 3 :] = 0
    return rows


def text(model: nn.Module) -> Inputs:
    """Tokens that are predicted themselves: causal and masked language models."""
    tokens = ids()
    return {"input_ids": tokens, "attention_mask": mask(), "labels": tokens}


def unmasked(model: nn.Module) -> Inputs:
    tokens = ids()
    return {"input_ids": tokens, "labels": tokens}


def classes(model: nn.Module) -> Inputs:
    return {"input_ids": ids(), "attention_mask": mask(), "labels": torch.tensor([0, 2])}


def spans(model: nn.Module) -> Inputs:
    places = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    return {"input_ids": ids(), "attention_mask": mask(), **places}


def tokens_classified(model: nn.Module) -> Inputs:
    return {"input_ids": ids(), "attention_mask": mask(), "labels": torch.randint(0, 3, (BATCH, LENGTH))}


def choices(model: nn.Module) -> Inputs:
    many = torch.randint(3, 90, (BATCH, 3, LENGTH))
    return {"input_ids": many, "attention_mask": torch.ones_like(many), "labels": torch.tensor([0, 2])}


def pair(model: nn.Module) -> Inputs:
    """Encoder-decoder models."""
    return {"input_ids": ids(), "attention_mask": mask(), "labels": ids(length=6)}


def only_text(model: nn.Module) -> Inputs:
    return {"input_ids": ids(), "attention_mask": mask()}


def image(size: int = 32, labels: bool = True) -> Callable[[nn.Module], Inputs]:
    def inputs(model: nn.Module) -> Inputs:
        pixels = torch.randn(BATCH, 3, size, size, requires_grad=True)
        return {"pixel_values": pixels} | ({"labels": torch.tensor([0, 2])} if labels else {})

    return inputs


def segmentation(size: int = 32) -> Callable[[nn.Module], Inputs]:
    def inputs(model: nn.Module) -> Inputs:
        labels = torch.randint(0, 3, (BATCH, size, size))
        return {"pixel_values": torch.randn(BATCH, 3, size, size, requires_grad=True), "labels": labels}

    return inputs


def image_and_text(model: nn.Module) -> Inputs:
    return {
        "input_ids": ids(),
        "pixel_values": torch.randn(BATCH, 3, 32, 32, requires_grad=True),
        "attention_mask": mask(),
        "return_loss": True,
    }


def sound(labels: Callable[[], torch.Tensor], length: int = 400) -> Callable[[nn.Module], Inputs]:
    return lambda model: {"input_values": torch.randn(BATCH, length), "labels": labels()}


def spectrogram(model: nn.Module) -> Inputs:
    features = torch.randn(BATCH, model.config.num_mel_bins, 32, requires_grad=True)
    return {"input_features": features, "labels": ids(length=6)}


def letters() -> torch.Tensor:
    return torch.randint(1, 30, (BATCH, 4))


def label() -> torch.Tensor:
    return torch.tensor([0, 2])


CONVS = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 8}
WAV = {
    **CONVS,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "vocab_size": 32,
    "apply_spec_augment": False,
}
ONE_STAGE = {"depths": [1, 1], "hidden_sizes": [16, 32]}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
MAMBA = {"intermediate_size": 64, "time_step_rank": 4}

FAMILIES = [
    # text: decoders
    Family("GPT2LMHeadModel", "text", text),
    Family("GPTNeoForCausalLM", "text", text, {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    Family("GPTNeoXForCausalLM", "text", text),
    Family("GPTJForCausalLM", "text", text, {"rotary_dim": 4}),
    Family("GPTBigCodeForCausalLM", "text", text),
    Family("OpenAIGPTLMHeadModel", "text", text),
    Family("CTRLLMHeadModel", "text", text, {"dff": 64}),
    Family("OPTForCausalLM", "text", text, {"word_embed_proj_dim": 32}),
    Family("BloomForCausalLM", "text", text),
    Family("CodeGenForCausalLM", "text", text, {"rotary_dim": 4}),
    Family("FalconForCausalLM", "text", text),
    Family("MptForCausalLM", "text", text, {"max_seq_len": 64}),
    Family("LlamaForCausalLM", "text", text),
    Family("MistralForCausalLM", "text", text),
    Family("Qwen2ForCausalLM", "text", text),
    Family("Qwen3ForCausalLM", "text", text),
    Family("GemmaForCausalLM", "text", text),
    Family("Gemma2ForCausalLM", "text", text),
    Family("Gemma3ForCausalLM", "text", text),
    Family("PhiForCausalLM", "text", text),
    Family("Phi3ForCausalLM", "text", text),
    Family("StableLmForCausalLM", "text", text),
    Family("CohereForCausalLM", "text", text),
    Family("OlmoForCausalLM", "text", text),
    Family("Olmo2ForCausalLM", "text", text),
    Family("GraniteForCausalLM", "text", text),
    Family("GlmForCausalLM", "text", text),
    Family("NemotronForCausalLM", "text", text, {"num_key_value_heads": 2}),
    Family("PersimmonForCausalLM", "text", text),
    Family("BioGptForCausalLM", "text", text),
    Family("XGLMForCausalLM", "text", text, {"attention_heads": 4}),
    Family("SmolLM3ForCausalLM", "text", text),
    Family("Starcoder2ForCausalLM", "text", text),
    # text: encoders
    Family("BertForMaskedLM", "text", text),
    Family("BertForQuestionAnswering", "text", spans, {"num_labels": 2}),
    Family("RobertaForSequenceClassification", "text", classes),
    Family("AlbertForMaskedLM", "text", text, {"embedding_size": 16}),
    Family("DistilBertForTokenClassification", "text", tokens_classified),
    Family("ElectraForMaskedLM", "text", text, {"embedding_size": 16}),
    Family("DebertaForMaskedLM", "text", text, {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    Family("DebertaV2ForMaskedLM", "text", text, {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    Family("CamembertForMaskedLM", "text", text),
    Family("XLMRobertaForMultipleChoice", "text", choices),
    Family("MPNetForMaskedLM", "text", text),
    Family("MobileBertForMaskedLM", "text", text, {"embedding_size": 16, "intra_bottleneck_size": 16}),
    Family("SqueezeBertForMaskedLM", "text", text, {"embedding_size": 32}),
    Family("ConvBertForMaskedLM", "text", text, {"embedding_size": 16}),
    Family("RoFormerForMaskedLM", "text", text, {"embedding_size": 32}),
    Family("NystromformerForMaskedLM", "text", unmasked, {"num_landmarks": 4, "segment_means_seq_len": 8, "conv_kernel_size": 3}),
    Family("FNetForMaskedLM", "text", unmasked),
    Family("FunnelForMaskedLM", "text", text, {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_inner": 64}),
    Family("XLMForQuestionAnsweringSimple", "text", spans, {"num_labels": 2}),
    Family("XLNetForSequenceClassification", "text", classes, {"d_inner": 64}),
    Family("LayoutLMForSequenceClassification", "text", classes),
    Family("ModernBertForMaskedLM", "text", text),
    Family("MegatronBertForMaskedLM", "text", text),
    Family("ErnieForMaskedLM", "text", text),
    Family("EsmForMaskedLM", "text", text, {"vocab_size": 96, "pad_token_id": 0, "mask_token_id": 4}),
    # encoder-decoder
    Family("T5ForConditionalGeneration", "encoder-decoder", pair, {"decoder_start_token_id": 0}),
    Family("UMT5ForConditionalGeneration", "encoder-decoder", pair),
    Family("BartForConditionalGeneration", "encoder-decoder", pair),
    Family("MBartForConditionalGeneration", "encoder-decoder", pair),
    Family("PegasusForConditionalGeneration", "encoder-decoder", pair),
    Family("MarianMTModel", "encoder-decoder", pair, {"decoder_vocab_size": 96}),
    Family("BlenderbotForConditionalGeneration", "encoder-decoder", pair),
    Family("M2M100ForConditionalGeneration", "encoder-decoder", pair),
    Family("ProphetNetForConditionalGeneration", "encoder-decoder", pair, {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}),
    # mixture of experts
    Family("MixtralForCausalLM", "mixture of experts", text),
    Family("Qwen2MoeForCausalLM", "mixture of experts", text),
    Family("Qwen3MoeForCausalLM", "mixture of experts", text),
    Family("OlmoeForCausalLM", "mixture of experts", text),
    Family("DeepseekV2ForCausalLM", "mixture of experts", text, {"n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2}),
    Family("SwitchTransformersForConditionalGeneration", "mixture of experts", pair, {"decoder_start_token_id": 0, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}),
    Family("GptOssForCausalLM", "mixture of experts", text),
    # state space and recurrent
    Family("MambaForCausalLM", "state space", unmasked, MAMBA),
    Family("Mamba2ForCausalLM", "state space", unmasked, {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
    Family("FalconMambaForCausalLM", "state space", unmasked, MAMBA),
    Family("RwkvForCausalLM", "state space", lambda model: {**unmasked(model), "use_cache": False}, {"attention_hidden_size": 32}),
    Family("RecurrentGemmaForCausalLM", "state space", text, {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]}),
    Family("JambaForCausalLM", "state space", text, {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False, "expert_layer_period": 2, "expert_layer_offset": 1}),
    # vision
    Family("ViTForImageClassification", "vision", image()),
    Family("DeiTForImageClassification", "vision", image()),
    Family("BeitForImageClassification", "vision", image()),
    Family("ResNetForImageClassification", "vision", image(), {**ONE_STAGE, "embedding_size": 8}),
    Family("RegNetForImageClassification", "vision", image(), {**ONE_STAGE, "embedding_size": 8, "groups_width": 8}),
    Family("ConvNextForImageClassification", "vision", image(), {**ONE_STAGE, "num_stages": 2, "patch_size": 4}),
    Family("ConvNextV2ForImageClassification", "vision", image(), {**ONE_STAGE, "num_stages": 2, "patch_size": 4}),
    Family("SwinForImageClassification", "vision", image(), SWIN),
    Family("Swinv2ForImageClassification", "vision", image(), {**SWIN, "pretrained_window_sizes": [0, 0]}),
    Family("PoolFormerForImageClassification", "vision", image()),
    Family("LevitForImageClassification", "vision", image(64), {"hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8], "image_size": 64, "patch_size": 16}),
    Family("MobileNetV2ForImageClassification", "vision", image()),
    Family("EfficientNetForImageClassification", "vision", image(), {"hidden_dim": 128, "width_coefficient": 0.1, "depth_coefficient": 0.3}),
    Family("MobileViTForImageClassification", "vision", image(64), {"image_size": 64, "patch_size": 2}),
    Family("PvtForImageClassification", "vision", image(64), {"image_size": 64}),
    Family("SegformerForSemanticSegmentation", "vision", segmentation(64), {"image_size": 64, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16}),
    Family("Dinov2ForImageClassification", "vision", image()),
    Family("ViTMSNForImageClassification", "vision", image()),
    Family("FocalNetForImageClassification", "vision", image(), {"embed_dim": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3], "patch_size": 4}),
    Family("BitForImageClassification", "vision", image(), {**ONE_STAGE, "embedding_size": 8, "num_groups": 4}),
    # speech
    Family("Wav2Vec2ForCTC", "speech", sound(letters), WAV),
    Family("HubertForCTC", "speech", sound(letters), WAV),
    Family("WavLMForSequenceClassification", "speech", sound(label), {**WAV, "classifier_proj_size": 16}),
    Family("UniSpeechForSequenceClassification", "speech", sound(label), {**WAV, "classifier_proj_size": 16}),
    Family("SEWForCTC", "speech", sound(letters), {**WAV, "conv_dim": (16, 16), "squeeze_factor": 2}),
    Family("WhisperForConditionalGeneration", "speech", spectrogram, {"max_source_positions": 16}),
    Family("Speech2TextForConditionalGeneration", "speech", lambda model: {"input_features": torch.randn(BATCH, 32, 80), "labels": ids(length=6)}, {"conv_channels": 32, "input_feat_per_channel": 80}),
    Family("ASTForAudioClassification", "speech", lambda model: {"input_values": torch.randn(BATCH, 32, 16, requires_grad=True), "labels": label()}, {"max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8}),
    # multimodal
    Family("CLIPModel", "multimodal", image_and_text),
    Family("SiglipModel", "multimodal", lambda model: {**image_and_text(model), "attention_mask": None}),
    Family("AltCLIPModel", "multimodal", image_and_text),
    Family("ChineseCLIPModel", "multimodal", image_and_text),
    Family("ViltForImagesAndTextClassification", "multimodal", lambda model: {"input_ids": ids(), "pixel_values": torch.randn(BATCH, 2, 3, 32, 32), "labels": label()}, {"num_images": 2, "modality_type_vocab_size": 3, "max_image_length": -1}),
    Family("BlipForConditionalGeneration", "multimodal", lambda model: {"input_ids": ids(), "pixel_values": torch.randn(BATCH, 3, 32, 32, requires_grad=True), "labels": ids()}),
    Family("GroupViTModel", "multimodal", image_and_text, {"vision_config": {"depths": [1, 1], "num_group_tokens": [4, 2], "num_output_groups": [4, 2], "patch_size": 8}}, ("eval",)),  # it draws at random in train mode
    Family("LlavaForConditionalGeneration", "multimodal", lambda model: {"input_ids": torch.cat([torch.full((BATCH, 16), 95), ids()], 1), "pixel_values": torch.randn(BATCH, 3, 32, 32, requires_grad=True), "labels": ids(length=24)}, {"image_token_index": 95, "image_token_id": 95}),
    # time series
    Family("PatchTSTForPrediction", "time series", lambda model: {"past_values": torch.randn(BATCH, 32, 2, requires_grad=True), "future_values": torch.randn(BATCH, 8, 2)}, {"num_input_channels": 2, "context_length": 32, "prediction_length": 8, "patch_length": 8, "patch_stride": 8, "loss": "mse"}),
    Family("PatchTSMixerForPrediction", "time series", lambda model: {"past_values": torch.randn(BATCH, 32, 2, requires_grad=True), "future_values": torch.randn(BATCH, 8, 2)}, {"num_input_channels": 2, "context_length": 32, "prediction_length": 8, "patch_length": 8, "patch_stride": 8}),
]  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}


def family_of(name: str) -> str:
    """The family (the folder of transformers) that a class is in."""
    return getattr(transformers, name).__module__.split(".")[2]
