import json
import subprocess
import sys

import pytest
import torch
from run_folder import networks, small_config, write_images, write_run
from safetensors.torch import load_file

from m3i_scale.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def config(folder):
    return small_config(folder)


@pytest.fixture(scope="module")
def made(config):
    return networks(config, seed=4)


@pytest.fixture(scope="module")
def run(config, made):
    return write_run(config, made, steps=(4, 8))


@pytest.fixture(scope="module")
def indexes(folder):
    return [
        write_images(folder, "gallery", range(16), "text"),
        write_images(folder, "heldout", range(20, 30), "both"),
    ]


@pytest.fixture(autouse=True)
def same_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom m3i_scale.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'deepspeed', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("glyphs", "shards", "sweep", "tokenizer", "eval", "export"):
        assert command in done.stdout


def test_checkpoints_are_read_without_deepspeed():
    code = "import sys, m3i_scale.engine.checkpoint\nassert 'deepspeed' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["glyphs", "shards", "sweep", "tokenizer", "eval", "export"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"m3i {command}" in capsys.readouterr().out


def test_eval(run, indexes, capsys):
    gallery, queries = indexes
    code = main(["eval", "--run", str(run), "--gallery", gallery, "--queries", queries,
                 "--probe", "--neighbours", "3", "--subject", "thing"])  # fmt: skip
    assert code == 0
    out = capsys.readouterr().out
    written = json.loads((run / "eval.json").read_text())
    assert written["step"] == 8
    assert written["queries"]["images"] == 10
    tasks = [row["task"] for row in written["rows"]]
    assert "kNN thing" in tasks
    assert "linear probe thing" in tasks
    assert all(f"| {task}" in out for task in tasks)
    for name in ("retrieval.png", "curves.png"):
        assert (run / name).read_bytes()[:4] == b"\x89PNG"


def test_export(run, made, folder, capsys):
    out = folder / "student.safetensors"
    assert main(["export", "--run", str(run), "--step", "4", "--out", str(out)]) == 0
    name, tensor = next(iter(made.student.backbone.state_dict().items()))
    assert torch.equal(load_file(out)[name], tensor)
    assert "student, backbone, fp32" in capsys.readouterr().out


def test_tokenizer(indexes, folder, capsys):
    out = folder / "trained.json"
    assert main(["tokenizer", *indexes, "--vocab-size", "45", "--out", str(out)]) == 0
    vocabulary = json.loads(out.read_text())["model"]["vocab"]
    assert "##tyle" in vocabulary or "style" in vocabulary  # in every caption
    assert f"{len(vocabulary)} tokens from 26 captions" in capsys.readouterr().out


def damaged(tmp_path, config, made):
    folder = write_run(config.model_copy(update={"folder": str(tmp_path)}), made, steps=(1, 2))
    tensors = folder / "checkpoints" / "step-00000002" / "rank-00001-of-00002.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    return folder


def test_a_damaged_checkpoint_is_named_with_the_others(tmp_path, config, made, capsys):
    folder = damaged(tmp_path, config, made)
    export = ["export", "--run", str(folder), "--out", str(tmp_path / "x.safetensors")]
    assert main(export) == 2
    assert "does not match its checksum; choose another one with --step, there are [1]" in (
        capsys.readouterr().err
    )
    assert main([*export, "--step", "1"]) == 0


def test_mistakes_are_one_sentence(run, indexes, tmp_path, capsys):
    gallery, _ = indexes
    out = str(tmp_path / "x.safetensors")
    category = write_images(tmp_path, "category", range(3), "category")
    nowhere = str(tmp_path / "nowhere")
    mistakes = {
        "cannot read the configuration file": ["export", "--run", nowhere, "--out", out],
        "no checkpoint of step 5; there are [4, 8]": [
            "export", "--run", str(run), "--step", "5", "--out", out],
        "name it *.safetensors": ["export", "--run", str(run), "--out", "x.pt"],
        "gallery and queries at once": [
            "eval", "--run", str(run), "--gallery", gallery, "--queries", gallery],
        "there is no index": [
            "eval", "--run", str(run), "--gallery", nowhere, "--queries", gallery],
        "has no captions": ["tokenizer", category, "--vocab-size", "99", "--out", out],
        "there is no folder": ["tokenizer", gallery, "--vocab-size", "99", "--out",
                               nowhere + "/tokenizer.json"],
        "vocab_size=5": ["tokenizer", gallery, "--vocab-size", "5", "--out", out],
    }  # fmt: skip
    for message, arguments in mistakes.items():
        assert main(arguments) == 2, arguments
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: "), lines
        assert message in lines[-1]
        assert not any(line.startswith("Traceback") for line in lines)


def test_traceback_on_request(tmp_path):
    with pytest.raises(ValueError, match="cannot read the configuration"):
        main(["--traceback", "export", "--run", str(tmp_path), "--out", "x.safetensors"])


def test_faults_of_the_program_are_not_hidden(run, monkeypatch):
    def fault(*arguments, **options):
        raise KeyError("a fault")

    monkeypatch.setattr("m3i_scale.transfer.export.export", fault)
    with pytest.raises(KeyError):
        main(["export", "--run", str(run), "--out", "x.safetensors"])


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evil"])
    assert stop.value.code == 2
    assert "invalid choice: 'evil'" in capsys.readouterr().err
