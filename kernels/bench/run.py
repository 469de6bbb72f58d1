"""Benchmark the operators on a GPU, or read the compiler's report without one.

    python kernels/bench/run.py --op dcnv3                      on a GPU
    python kernels/bench/run.py --op dcnv3 --problems "H 192"   only problems with this in the name
    python kernels/bench/run.py --op dcnv3 --against ../base    in turns with another checkout
    python kernels/bench/run.py --static                        anywhere

An implementation that raises, or disagrees with the float64 reference, is not timed: its row says
why, the others go on, and the exit code is 1 if it is one of this library. Where the official DCNv3
or DCNv4 is installed, it is compared in float16, whatever `--dtype` says.
"""

import argparse
import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator

# Measured and compiled kernels are native ones; Triton reads this when it is imported.
os.environ["TRITON_INTERPRET"] = "0"

import against
import compile_only
import measure
import operators
import static
import tables
import torch

RESULTS = pathlib.Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STATIC_COLUMNS = static.StaticCount._fields
COLUMNS = (
    "problem",
    "dtype",
    "direction",
    "implementation",
    "ms_p50",
    "gb_per_s",
    "fraction_of_copy",
    "limit",
    "fraction_of_roofline",
    "base_ms_p50",
    "speedup",
    "failed",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.static:
        return run_static(options)
    if not torch.cuda.is_available():
        print(
            "There is no GPU here, so nothing can be timed. `--static` compiles every kernel for "
            f"{', '.join(compile_only.TARGETS)} and reports registers, spills and shared memory.",
            file=sys.stderr,
        )
        return 2
    if options.against and not (options.against / "kernels" / "m3i_kernels").is_dir():
        print(
            f"--against {options.against} is no checkout: it has no folder kernels/m3i_kernels.",
            file=sys.stderr,
        )
        return 2
    chosen = options.op or list(operators.OPERATORS)
    return max(run_operator(operators.OPERATORS[name], options) for name in chosen)


def run_static(options: argparse.Namespace) -> int:
    """Compile the shipped configurations, print and write the report, name what is wrong."""
    chosen = [
        c
        for c in static.configurations()
        if (not options.op or c.operator in options.op) and _wanted(c.name, options)
    ]
    rows = []
    for row in static.report(chosen, options.targets, options.processes):
        rows.append(row)
        print(tables.markdown([row], STATIC_COLUMNS).splitlines()[-1], flush=True)
    if not rows:
        print("No configuration has that name.", file=sys.stderr)
        return 2
    versions = f"torch {torch.__version__}, triton {measure.triton.__version__}"
    text = f"# Compiler report\n\n{versions}\n\n{tables.markdown(rows, STATIC_COLUMNS)}"
    (options.out / "static.md").write_text(text)
    tables.write_csv(rows, options.out / "static.csv")
    wrong = static.problems(rows)
    print(f"{len(rows)} kernels compiled; {len(wrong)} spill or do not fit.")
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


def run_operator(operator: operators.Operator, options: argparse.Namespace) -> int:
    """Check, time and report one operator on the GPU."""
    torch.cuda.init()
    device = "cuda"
    bandwidth = measure.copy_bandwidth(device)
    print(f"{operator.name}: a copy moves {bandwidth * 1e-9:.0f} GB/s")
    print(tables.markdown([], COLUMNS), end="", flush=True)
    rows: list[measure.Timing] = []
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(against.Base(options.against)) if options.against else None
        for problem, name in _cases(operator, options):
            timed = None
            if base is not None and name.startswith("triton"):
                timed = base.timer(operator.name, problem, options.batch, name)
            try:
                new = measure.measure(
                    operator, problem, options.batch, device, bandwidth, name, timed
                )
            except Exception as error:  # of any implementation: the others go on
                new = [measure.failure(operator, problem, options.batch, name, device, error)]
            torch.cuda.empty_cache()
            rows += new
            print(*tables.markdown(new, COLUMNS).splitlines()[2:], sep="\n", flush=True)
    if rows:
        stem = f"{operator.name}_{options.dtype}"
        tables.write_csv(rows, options.out / f"{stem}.csv")
        (options.out / f"{stem}.md").write_text(tables.markdown(rows, COLUMNS))
        if timed_rows := [r for r in rows if not r.failed]:
            tables.plot(timed_rows, options.out / f"{stem}.png")
    return int(any(r.failed and r.implementation.startswith("triton") for r in rows))


def _cases(
    operator: operators.Operator, options: argparse.Namespace
) -> Iterator[tuple[operators.Problem, str]]:
    """Problems and names of implementations; the official ones with ours beside them in float16."""
    for problem in operator.problems(options.batch, DTYPES[options.dtype]):
        if not _wanted(problem.name, options):
            continue
        names = list(operator.implementations(problem))
        cases = [(problem, name) for name in names]
        half = problem._replace(dtype=torch.float16)
        official = [n for n in operator.implementations(half) if n.startswith("official")]
        if official and problem.dtype != torch.float16:
            cases += [(half, name) for name in ("triton", *official)]
        for case, name in cases:
            if not options.implementations or name in options.implementations:
                yield case, name


def _wanted(name: str, options: argparse.Namespace) -> bool:
    return any(words in name for words in options.problems)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", action="append", choices=list(operators.OPERATORS))
    parser.add_argument("--static", action="store_true", help="compile only, no GPU needed")
    parser.add_argument(
        "--problems", nargs="*", default=[""], help="only those with one of these in their name"
    )
    parser.add_argument("--implementations", nargs="*", default=[], help="only these")
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument(
        "--against", type=pathlib.Path, metavar="FOLDER", help="another checkout, timed in turns"
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    targets = list(compile_only.TARGETS)
    parser.add_argument("--targets", nargs="*", default=targets, choices=targets)
    parser.add_argument("--processes", type=int, default=2, help="of --static")
    return parser


if __name__ == "__main__":
    sys.exit(main())
