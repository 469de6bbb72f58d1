"""In what trained networks are evaluated, and what that changes."""

from __future__ import annotations

import pytest
import torch

from helpers.run_folder import networks
from m3i_scale.models.tokenizer import load_tokenizer
from m3i_scale.transfer.features import encode_captions, encode_images
from m3i_scale.transfer.precision import choose_precision, prepare

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a GPU with or without bf16."""

    def there_is(*, bf16: bool, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA V100")

    return there_is


def test_a_gpu_computes_in_bf16_where_it_can_and_a_cpu_in_fp32(gpu):
    gpu(bf16=True)
    assert choose_precision("auto", GPU) == "bf16"
    assert choose_precision("tf32", GPU) == "tf32"
    assert choose_precision("fp32", GPU) == "fp32"
    assert choose_precision("auto", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"
    gpu(bf16=False, capability=(7, 0))
    assert choose_precision("auto", GPU) == "fp32"


@pytest.mark.parametrize("wanted", ["bf16", "tf32"])
def test_what_a_device_cannot_do_is_refused(wanted, gpu):
    gpu(bf16=False, capability=(7, 0))
    name = {"bf16": "bf16", "tf32": "TF32"}[wanted]
    with pytest.raises(ValueError, match=f"--precision {wanted}: NVIDIA V100 has no {name}"):
        choose_precision(wanted, GPU)
    with pytest.raises(ValueError, match="a CPU has no TF32"):
        choose_precision("tf32", CPU)


@pytest.fixture
def numerics():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("numerics")
def test_tf32_is_on_only_where_it_was_asked_for():
    for precision, matmul, convolution in (
        ("tf32", "high", True),
        ("fp32", "highest", False),
        ("bf16", "highest", False),
    ):
        prepare({}, CPU, precision)
        assert torch.get_float32_matmul_precision() == matmul
        assert torch.backends.cudnn.allow_tf32 is convolution


@pytest.mark.usefixtures("numerics")
def test_features_in_bf16_are_those_of_fp32_rounded(config):
    tokenizer = load_tokenizer(config.model.text.tokenizer)
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = {}
    for precision in ("fp32", "bf16"):
        model = networks(config, seed=1)
        prepare({"trained": model}, CPU, precision)
        encoded = encode_images(model, images)
        captions = encode_captions(model, tokenizer, ["thing a", "thing b, style 3"], max_length=8)
        found[precision] = (encoded.pooled, encoded.text, encoded.category, captions)
    for exact, rounded in zip(found["fp32"], found["bf16"], strict=True):
        assert rounded.dtype == torch.float32
        assert not torch.equal(exact, rounded), "nothing was computed in bf16"
        assert torch.cosine_similarity(exact, rounded).min() > 0.999
