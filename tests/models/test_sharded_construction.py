"""The networks may be built under a context that splits parameters as constructors return."""

import subprocess
import sys

import pytest

SCRIPT = """
import deepspeed, torch
from m3i_scale.models.backbone import build_backbone
from m3i_scale.models.category_head import CategoryHead
from m3i_scale.models.image_decoder import ImageDecoder
from m3i_scale.models.text_tower import TextTower

def build():
    torch.manual_seed(0)
    return torch.nn.ModuleList([
        build_backbone("intern_image", channels=16, depths=[1] * 4, groups=[1, 2, 4, 8],
                       center_feature_scale=True, clip_projector_width=32, clip_heads=4),
        build_backbone("vit", width=32, depth=1, heads=4, pool_heads=4, embed_dim=20),
        ImageDecoder(32, out_width=32, width=32, depth=1, heads=4, ffn=64),
        TextTower(50, width=32, depth=1, heads=4, ffn=64),
        CategoryHead(20, 5),
    ])

expected = {name: p.detach() for name, p in build().named_parameters()}
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
with deepspeed.zero.Init(config_dict_or_path=config):
    model = build()
for name, p in model.named_parameters():
    shard = p.ds_tensor[: expected[name].numel()].view_as(expected[name])
    assert torch.equal(shard, expected[name]), name
torch.distributed.destroy_process_group()
print("compared", len(expected))
"""


@pytest.mark.distributed
def test_initial_weights_do_not_depend_on_sharding(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "compared" in run.stdout
