import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from helpers.run_folder import write_run
from helpers.shards import write_images
from m3i_scale.cli import COMMANDS, main, parse

ALL = [command for commands in COMMANDS.values() for command in commands]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def run(finished, folder):
    """The finished run, a copy that commands write into."""
    return shutil.copytree(finished.path, folder / "run")


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
    for command in ALL:
        assert command in done.stdout


def test_checkpoints_are_read_without_deepspeed():
    code = "import sys, m3i_scale.engine.checkpoint\nassert 'deepspeed' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ALL)
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
    assert written["step"] == 7
    assert written["precision"] == "fp32"
    assert "computed in fp32 on cpu" in out
    assert written["queries"]["images"] == 10
    tasks = [row["task"] for row in written["rows"]]
    assert "kNN thing" in tasks
    assert "linear probe thing" in tasks
    assert all(f"| {task}" in out for task in tasks)
    for name in ("retrieval.png", "curves.png"):
        assert (run / name).read_bytes()[:4] == b"\x89PNG"


def test_eval_finds_captions_and_names_categories(run, indexes, folder, capsys):
    gallery, queries = indexes
    (folder / "names.txt").write_text("red\ngreen\nblue\ngrey\nblack\n")
    (folder / "templates.txt").write_text("a photo of a {}.\nthing {}, style 2\n")
    words = ["eval", "--run", str(run), "--gallery", gallery, "--queries", queries,
             "--no-pictures", "--retrieval", "2",
             "--classes", str(folder / "names.txt")]  # fmt: skip
    assert main([*words, "--templates", str(folder / "templates.txt")]) == 0
    written = json.loads((run / "eval.json").read_text())
    tasks = {row["task"]: row for row in written["rows"]}
    assert tasks["retrieval, image to text, R@2"]["queries"] == 10
    assert tasks["zero-shot category by name, top-1"]["labels"] == 5
    assert "retrieval, text to image, R@2" in tasks
    assert written["templates"].endswith("templates.txt")
    for text, sentence in (
        ("a photo", "has the line 'a photo'; each has {} once"),
        ("{}\n\n{}\n", "line 2 of"),
        ("", "is empty"),
    ):
        (folder / "templates.txt").write_text(text)
        assert main([*words, "--templates", str(folder / "templates.txt")]) == 2
        assert sentence in capsys.readouterr().err
    (folder / "names.txt").write_text("red\ngreen\n")
    assert main(words) == 2
    assert "--classes has 2 names" in capsys.readouterr().err
    (folder / "names.txt").write_text("red\ngreen\nred\n")
    assert main(words) == 2
    assert "has 'red' as category 0 and 2" in capsys.readouterr().err


def test_eval_in_bf16(run, indexes, capsys):
    gallery, queries = indexes
    code = main(["eval", "--run", str(run), "--gallery", gallery, "--queries", queries,
                 "--precision", "bf16", "--no-pictures"])  # fmt: skip
    assert code == 0
    assert json.loads((run / "eval.json").read_text())["precision"] == "bf16"
    assert "computed in bf16 on cpu" in capsys.readouterr().out
    assert main(["eval", "--run", str(run), "--gallery", gallery, "--queries", queries,
                 "--precision", "tf32"]) == 2  # fmt: skip
    assert "--precision tf32: a CPU has no TF32" in capsys.readouterr().err


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
        "no checkpoint of step 5; there are [4, 7]": [
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


@pytest.mark.parametrize("place", [0, 1, 3, 5])
def test_traceback_anywhere(tmp_path, place):
    words = ["export", "--run", str(tmp_path), "--out", "x.safetensors"]
    with pytest.raises(ValueError, match="cannot read the configuration"):
        main([*words[:place], "--traceback", *words[place:]])


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("m3i_scale ")


@pytest.mark.parametrize(
    ("words", "file", "overrides"),
    [
        ("plan a=1 --config F b.c=2 --nodes 2 d=[1, e]", "config", ["a=1", "b.c=2", "d=[1,e]"]),
        ("plan --config F --nodes 2 a=1 b=2", "config", ["a=1", "b=2"]),
        ("plan --config F a=1 --out o a=--x", "config", ["a=1", "a=--x"]),
        ("sweep F a=1 --dry-run b=2", "file", ["a=1", "b=2"]),
        ("sweep --dry-run F a=1 --only 3 b=2", "file", ["a=1", "b=2"]),
    ],
)
def test_overrides_stand_on_both_sides_of_options(words, file, overrides):
    options = parse(words.replace("[1, e]", "[1,e]").split())
    assert getattr(options, file) == "F"
    assert options.overrides == overrides


@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        ("plan --config F a=1 --nodse 2", "--nodse 2"),
        ("plan --config F a=1 --nodes 2 --onn=3", "--onn=3"),
        ("plan --config F a=1 --nodes 2 b", "b"),
        ("export --run r --out o a=1", "a=1"),
        ("shards show i a=1", "a=1"),
    ],
)
def test_what_no_command_knows_is_refused(words, unknown, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(words.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: unrecognized arguments: {unknown}\n")


def test_paths_behind_an_equals_sign_are_expanded(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("SCRATCH", "/s")
    monkeypatch.delenv("NOWHERE", raising=False)
    words = ["plan", "--config=~/c.yaml", "--out=$SCRATCH/o", "folder=~/runs"]
    options = parse(words)
    assert str(options.out) == "/s/o"
    # The configuration's own rule expands these, once.
    assert (options.config, options.overrides) == ("~/c.yaml", ["folder=~/runs"])
    options = parse(
        ["eval", "--run=~/r", "--gallery", "~/g", "$SCRATCH/g", "--queries", "s3://b/$SCRATCH"]
    )
    assert (str(options.folder), options.gallery) == ("/h/r", ["/h/g", "/s/g"])
    assert options.queries == ["s3://b//s"]
    options = parse(["export", "--run", "~/r", "--out=~/b.safetensors"])
    assert (str(options.folder), str(options.out)) == ("/h/r", "/h/b.safetensors")
    assert parse(["shards", "index", "${SCRATCH}/*.tar", "--kind", "text", "-o", "~/i"]).shards == [
        "/s/*.tar"
    ]
    assert parse(["shards", "index", "pipe:cat $X", "--kind", "text", "-o", "i"]).shards == [
        "pipe:cat $X"
    ]
    assert main(["plan", "--config=$NOWHERE/c.yaml"]) == 2
    assert "NOWHERE is not set" in capsys.readouterr().err


IMPOSSIBLE = [
    *(f"plan --config F --utilisation {n}" for n in ("0", "-1", "1.5", "nan", "inf", "x")),
    *(f"plan --config F --network {n}" for n in ("0", "-1", "nan", "inf")),
    *(f"plan --config F --sample-bytes {n}" for n in ("0", "-1", "inf")),
    *(f"plan --config F --samples {n}" for n in ("0", "-1", "1.5", "inf")),
    *(f"plan --config F {o} {n}" for o in ("--nodes", "--gpus-per-node") for n in ("0", "-8", "x")),
    "sweep F --only -1",
    "sweep F --only 1.5",
    *(f"eval --run r --gallery g --queries q {o} {n}" for n in ("0", "-1", "1.5")
      for o in ("--limit", "--neighbours", "--batch")),
    "export --run r --out o --step -1",
    *(f"tokenizer i --out o --vocab-size {n}" for n in ("0", "-1", "1e400")),
    *(f"shards build s f {o} {n}" for n in ("0", "-1", "1.5", "x")
      for o in ("--shard-samples", "--shard-mib", "--quality", "-j")),
    "shards build s f --quality 101",
    "shards build s f --resize -1",
    "shards build s f --seed -1",
    "shards index s -o i --kind text -j 0",
    "shards show i --count 0",
    "glyphs --image-size 0",
    "glyphs --category-share 2",
]  # fmt: skip


@pytest.mark.parametrize("words", IMPOSSIBLE)
def test_impossible_numbers_are_refused_before_any_work(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(words.split())
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert words.split()[-1] in last
    assert "invalid" not in last  # argparse's word where a type gives no reason


def test_numbers_that_are_possible():
    words = "plan --config F --utilisation 1 --samples 1.28e6 --network 12.5 --sample-bytes 3e4"
    options = parse(words.split())
    assert (options.utilisation, options.samples, options.network) == (1, 1_280_000, 12.5)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "error: No space left on device"),
        (PermissionError(13, "Permission denied", "/a/b"), "error: /a/b: Permission denied"),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), "error: a: b: Invalid cross"),
        (ValueError("two\nlines"), "error: two lines"),
    ],
)
def test_errors_of_the_system_are_one_sentence(run, folder, monkeypatch, capsys, error, words):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("m3i_scale.transfer.export.export", fail)
    assert main(["export", "--run", str(run), "--out", str(folder / "x.safetensors")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(words)


def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(
    run, indexes, folder, monkeypatch, capsys
):
    def refuse(path):
        raise ValueError(f"{path}: nothing can be written there")

    def never(*arguments, **options):
        raise AssertionError("worked before it looked")

    monkeypatch.setattr("m3i_scale.paths.require_writable", refuse)
    for work in ("transfer.export.export", "transfer.evaluation.evaluate", "data.sequential.walk"):
        monkeypatch.setattr(f"m3i_scale.{work}", never)
    gallery, queries = indexes
    for words in (
        ["eval", "--run", str(run), "--gallery", gallery, "--queries", queries],
        ["export", "--run", str(run), "--out", str(folder / "x.safetensors")],
        ["tokenizer", gallery, "--vocab-size", "45", "--out", str(folder / "t.json")],
    ):
        assert main(words) == 2
        assert "nothing can be written there" in capsys.readouterr().err


@pytest.mark.parametrize("becomes", [KeyboardInterrupt, ImportError, SystemError, ValueError])
def test_ctrl_c_while_a_command_is_being_imported(monkeypatch, capsys, becomes):
    def interrupted(words):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise becomes("in a half-imported module") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("m3i_scale.cli.build_parser", interrupted)
    assert main(["glyphs"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_background_job_keeps_ignoring_ctrl_c(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(
            "m3i_scale.cli.build_parser", lambda words: signal.raise_signal(signal.SIGINT)
        )
        with pytest.raises(AttributeError):  # the parser's, not an interruption
            main(["glyphs"])
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evil"])
    assert stop.value.code == 2
    assert "invalid choice: 'evil'" in capsys.readouterr().err
