"""MiniCPM-V 2.6 as a model: sizes and names as published, encoder and resampler against plain formulas and
transformers, checkpoints in bf16 and NF4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hayate.checkpoint.config_json import ConfigReader
from hayate.checkpoint.placements import complete
from hayate.config import EngineOptions
from hayate.errors import ModelError, UsageError
from hayate.models import PRESETS, parse_config, preset_config
from hayate.models.decoder import meta_model
from hayate.models.minicpmv import MiniCPMV
from hayate.models.resampler import position_codes
from hayate.models.siglip import pack_pictures, position_buckets
from hayate.models.weights import placements
from hayate.runtime.loading import load_network, make_plan, open_checkpoint
from tests.vision import plain_minicpmv
from tests.vision.checkpoints import is_quantised, tensor_shapes, tiny_config, write_minicpmv

CPU = torch.device("cpu")
SIZES = [
    (8, 8),
    (5, 6),
    (1, 1),
    (2, 75),
]  # in patches; the last is longer than the table of positions


def load(folder: Path, dtype: str) -> MiniCPMV:
    config, checkpoint = open_checkpoint(folder)
    options = EngineOptions(device="cpu", dtype=dtype, kv_memory="16M")
    network, _ = load_network(config, checkpoint, make_plan(config, options, CPU))
    assert isinstance(network, MiniCPMV)
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("minicpmv")


@pytest.fixture(scope="module")
def weights(folder) -> dict[str, Tensor]:
    return {name: x.float() for name, x in write_minicpmv(folder).items()}


@pytest.fixture(scope="module")
def model(folder, weights) -> MiniCPMV:
    return load(folder, "float32")


def draw_pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 14 * h, 14 * w, generator=generator) * 2 - 1 for h, w in SIZES]


def to_patches(pictures: list[Tensor]) -> Tensor:
    """As `encode` takes them: each patch flattened as (colour, y, x)."""
    return torch.cat(
        [
            x.unfold(1, 14, 14).unfold(2, 14, 14).permute(1, 2, 0, 3, 4).reshape(-1, 588)
            for x in pictures
        ]
    )


@pytest.fixture(scope="module")
def expected(weights) -> Tensor:
    config = tiny_config()
    return torch.stack([plain_minicpmv.encode(x, weights, config) for x in draw_pictures()])


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def test_published_names_shapes_and_bytes():
    """The index of the real checkpoint: 789 tensors, 16,198,350,304 bytes."""
    config = preset_config("minicpm-v-2.6")
    parameters = dict(meta_model(config, dtype=torch.bfloat16).named_parameters())
    shapes = {
        p.source: tuple(parameters[p.target].detach()[p.index].shape)
        for p in complete(parameters, placements(config))
    }
    assert shapes == tensor_shapes(PRESETS["minicpm-v-2.6"])
    assert len(shapes) == 789
    assert sum(p.nbytes for p in parameters.values()) == 16_198_350_304
    assert config.num_parameters == 8_099_175_152
    assert config.vision is not None
    assert config.vision.num_parameters == 417_792_240 + 68_619_264


def test_published_quantised_layers():
    """331 matrices in NF4, none of them out_proj, kv_proj or lm_head; the rest stays bf16."""
    config = preset_config("minicpm-v-2.6-int4")
    assert config.nf4_modules is not None
    sources: dict[str, list[str]] = {}
    for p in placements(config):
        sources.setdefault(p.target, []).append(p.source)
    quantised = {
        source
        for module in config.nf4_modules
        for source in sources.get(f"{module}.weight", [f"{module}.weight"])
    }
    assert quantised == set(filter(is_quantised, tensor_shapes(PRESETS["minicpm-v-2.6"])))
    assert len(quantised) == 331
    assert config.num_parameters == 8_099_175_152


def test_encoder_and_resampler_against_plain_formulas(model, expected):
    """Packed pictures of several shapes, none of which sees another."""
    found = model.encode(to_patches(draw_pictures()), SIZES)
    assert found.shape == (len(SIZES), 8, 256)
    for picture, wanted in zip(found, expected, strict=True):
        # Sums of up to 588 products in another order, through two layers: some 1e-6 of each value's scale.
        assert relative(picture, wanted) < 1e-5
    # So pictures differ by more than their errors.
    assert relative(expected[0], expected[1]) > 0.1


def test_in_bf16(folder, weights, expected):
    found = load(folder, "bfloat16").encode(to_patches(draw_pictures()).bfloat16(), SIZES)
    assert found.dtype == torch.bfloat16
    for picture, wanted in zip(found, expected, strict=True):
        # Some thirty roundings of 2^-9 on the way, of random sign, and amplified where a norm removes a mean.
        assert relative(picture, wanted) < 0.03


def test_a_picture_does_not_depend_on_the_others(model):
    patches, end = to_patches(draw_pictures()), 0
    together = model.encode(patches, SIZES)
    for i, (h, w) in enumerate(SIZES):
        alone = model.encode(patches[end : end + h * w], [(h, w)])
        end += h * w
        assert relative(together[i], alone[0]) < 1e-5  # sums in another order, as above


def test_encoder_against_transformers(tmp_path):
    """On a square picture of the full grid SigLIP's own positions are the buckets."""
    transformers = pytest.importorskip("transformers")
    vision = tiny_config()["vision_config"] | {"image_size": 112}
    weights = write_minicpmv(tmp_path, vision_config=vision)
    config = transformers.SiglipVisionConfig(**vision, attn_implementation="eager")
    config.vision_use_head = False
    theirs = transformers.SiglipVisionModel(config).eval()
    named = {name.removeprefix("vpm."): x.float() for name, x in weights.items() if "vpm." in name}
    prefix = "vision_model." if any("vision_model." in n for n in theirs.state_dict()) else ""
    theirs.load_state_dict({prefix + name: x for name, x in named.items()})
    picture = draw_pictures()[0]
    with torch.no_grad():
        wanted = theirs(picture[None]).last_hidden_state[0]
    model = load(tmp_path, "float32")
    pictures = pack_pictures([(8, 8)], 8, CPU)
    with torch.inference_mode():
        found = model.vpm(to_patches([picture]), pictures)
    assert relative(found, wanted) < 1e-5


def test_language_model_against_transformers(folder, weights):
    transformers = pytest.importorskip("transformers")
    from tests.parity.compare import our_logits

    fields = {k: v for k, v in tiny_config().items() if k not in ("architectures", "model_type")}
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**fields)).eval()
    own = {n.removeprefix("llm."): x for n, x in weights.items() if n.startswith("llm.")}
    theirs.load_state_dict(own)
    ids = torch.randint(0, 288, (61,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(ids[None]).logits[0]
    found = our_logits(load(folder, "float32"), ids.tolist(), prompt_len=37)
    assert relative(found, wanted) < 1e-5


def test_nf4_checkpoint(tmp_path):
    """bitsandbytes' bytes give the model of the weights that they stand for."""
    pytest.importorskip("bitsandbytes")
    meant = {n: x.float() for n, x in write_minicpmv(tmp_path, nf4=True).items()}
    wanted = [plain_minicpmv.encode(x, meant, tiny_config()) for x in draw_pictures()]
    found = load(tmp_path, "float32").encode(to_patches(draw_pictures()), SIZES)
    for picture, expected in zip(found, wanted, strict=True):
        assert relative(picture, expected) < 1e-5  # as with dense weights


def test_position_buckets():
    def along(n: int) -> list[int]:
        return (position_buckets(n, 1, 70) // 70).tolist()

    assert along(32)[:10] == [0, 2, 4, 6, 8, 10, 13, 15, 17, 19]
    assert along(43)[:10] == [0, 1, 3, 4, 6, 8, 9, 11, 13, 14]
    assert along(70) == list(range(70))
    assert max(along(78)) <= 69
    assert position_buckets(2, 3, 70).tolist() == [0, 23, 46, 2450, 2473, 2496]


def test_position_codes():
    """The first half is of the column, the second of the row."""
    codes = position_codes(pack_pictures([(3, 4), (2, 130)], 70, CPU), 256, torch.float32)
    first, second = codes[:12].view(3, 4, 256), codes[12:].view(2, 130, 256)
    for grid in (first, second):
        columns, rows = grid.chunk(2, dim=-1)
        assert torch.equal(columns, columns[:1].expand_as(columns))
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
    plain = plain_minicpmv.position_code(3, 4, 256)
    torch.testing.assert_close(codes[:12], plain, rtol=0, atol=1e-7)  # one rounding to fp32
    assert torch.equal(second[:, :4], first[:2])


def test_what_does_not_fit_is_refused(model):
    patches = torch.zeros(30, 588)
    with pytest.raises(UsageError, match=r"\[\(5, 5\)\] patches have 25 rows"):
        model.encode(patches, [(5, 5)])
    with pytest.raises(UsageError, match="588 values"):
        model.encode(patches[:, :587], [(5, 6)])
    with pytest.raises(UsageError, match="at least one patch"):
        model.encode(patches[:0], [(0, 5)])
    assert model.encode(patches[:0], []).shape == (0, 8, 256)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": 2.0}, "version is 2.0"),
        ({"version": None}, "version"),
        ({"drop_vision_last_layer": True}, "drop_vision_last_layer"),
        ({"drop_vision_last_layer": None}, "drop_vision_last_layer"),
        ({"patch_size": 16}, "patch_size"),
        ({"query_num": 0}, "num_queries"),
        ({"query_num": None}, "query_num"),
        ({"hidden_size": 192}, "multiple of 128"),
        ({"slice_config": {"patch_size": 16}}, "slice_config.patch_size"),
        ({"slice_config": {"mystery": 1}}, "slice_config.mystery"),
        ({"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act"),
        ({"vision_config": {"num_attention_heads": 5}}, "num_attention_heads"),
        ({"vision_config": {"mystery": 1}}, "vision_config.mystery"),
        ({"vision_config": {"image_size": None}}, "vision_config.image_size"),
    ],
)
def test_configs_refused_by_name(changes, named):
    with pytest.raises(ModelError, match=named):
        parse_config(ConfigReader(tiny_config(**changes), "config.json"))


@pytest.mark.parametrize("section", ["vision_config", "slice_config"])
def test_config_without_a_section_is_refused(section):
    fields = {**tiny_config(), section: None}
    with pytest.raises(ModelError, match=f"{section} is missing"):
        parse_config(ConfigReader(fields, "config.json"))


def test_resaved_config_is_read():
    """transformers writes out every default when it saves a config again."""
    resaved = {
        "vision_batch_size": 16,
        "use_image_id": True,
        "sliding_window": None,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "vision_use_head": True,
            "num_channels": 3,
            "layer_norm_eps": 1e-6,
            "attention_dropout": 0.0,
            "torch_dtype": None,
            "id2label": {"0": "LABEL_0"},
            "top_k": 50,
        },
    }
    plain, again = (
        parse_config(ConfigReader(tiny_config(**c), "config.json")) for c in ({}, resaved)
    )
    assert plain == again
