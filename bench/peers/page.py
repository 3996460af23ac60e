"""Writes docs/peers.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.peers.comparison import Measured, Row
from bench.results import table

INTRODUCTION = """\
# Beside other systems

`python -m bench.peers` measures ragcache and other systems that reuse KV, on the same CPU, with the
same model, the same prompts and the same number of threads, in one run, and writes this page.
[bench/peers](../bench/peers) has one short module per system, and `python -m bench.peers.setup`
makes their environments with the versions in `bench/peers/requirements-*.txt`.

The prompts are those of a RAG service: instructions, chunks, a question. Every prompt has other
chunks of one pool in another order, so that two prompts rarely have more in common at the beginning
than the instructions. A system that can store the KV of single chunks has stored that of every
chunk of the pool, and every system has answered a prompt in every mode before the measurement.
Systems take turns prompt by prompt. Each runs in a process of its own, and stays loaded.
"""

#: Options that do not affect the numbers, such as where something is on one machine.
PLACES = "--python", "--environments", "--out", "--page", "--note"

COLUMNS = """\
- *TTFT*: from the prompt's token ids to the id of the first token, median over the prompts.
- *than own full*: how many times sooner than full prefill by the same system, median of the ratios
  prompt by prompt. *Than best full*: the lowest median TTFT of any system's full prefill, over this
  TTFT.
- *again*: TTFT when the same chunks come again in the same order with another question, which is
  where a prefix cache has everything but the question.
- *computed*: tokens of the prompt that went through the layers before the first token, as the
  system reports it, or as counted at its embedding (kvboost).
- *first token*, *tokens*, *F1*: agreement of the greedy answer with that of full prefill by the
  same system, since quantisation and kernels differ between systems: prompts with the same first
  token, positions with the same token, F1 over words.
"""


@dataclass(frozen=True)
class Text:
    """What the page says about a system besides its numbers."""

    title: str
    does: str
    cannot: str
    gpu: str = "no"


TEXTS = {
    "ragcache": Text(
        "ragcache",
        "Stores the KV of every chunk once, moves it to its position in the prompt, and recomputes "
        "the rows that the new context changes most (`fused`), none (`reuse`), or everything after "
        "the common beginning (`prefix`).",
        "`fused` and `reuse` are approximations of full prefill. Its full prefill is that of "
        "transformers, and its KV takes 4 bytes per number here.",
    ),
    "transformers": Text(
        "transformers",
        "Computes every prompt as a whole. This is what the other systems are built on or compared "
        "with.",
        "It reuses nothing between prompts, unless the caller keeps and crops the cache.",
    ),
    "llama_cpp": Text(
        "llama.cpp (llama-cpp-python)",
        "`prefix` is what `Llama.generate` does: it keeps the KV that a prompt has in common with "
        "the prompt before it, and computes the rest. `shifted` uses the low-level API: every "
        "chunk's KV is in memory in a sequence of its own, computed after the instructions, and "
        "`llama_memory_seq_add` moves it to its position, which rotates the keys. That is reuse "
        "without repair. It computes with the quantised weights of the GGUF file; the other "
        "systems have the same numbers in float32.",
        "Nothing is recomputed after a shift: llama.cpp has no call for it. `shifted` is code of "
        "this benchmark on the low-level API, at most 256 sequences per context; stored chunks "
        "occupy the context. `--cache-reuse` of the server moves KV in the same way, but only "
        "from the prompt before and in the same order, so it serves prompts that lose text at the "
        "front, not chunks in another order.",
    ),
    "vllm": Text(
        "vLLM for CPUs",
        "Its prefix cache keeps blocks of tokens of all prompts so far, and finds the longest "
        "common beginning with any of them. It is exact, and it batches requests, which this "
        "single-user measurement does not show.",
        "A chunk that is preceded by other tokens than before is computed again. "
        "ragcache also runs inside vLLM, see [vllm.md](vllm.md).",
    ),
    "kvboost": Text(
        "kvboost",
        "Cuts the prompt's tokens into pieces of 128 and looks each up, by all tokens up to it or "
        "by its own tokens. Pieces found by their own tokens alone are repaired with its "
        "*CacheBlend*.",
        "It counts pieces from the beginning of the prompt, so a chunk is found only if it "
        "begins at a multiple of 128 tokens: `chunks` finds hardly more than the instructions, and "
        "`chunks, padded` is given prompts in which line breaks fill every chunk up to a multiple "
        "of 128. Its repair first runs the whole cached text through the model, to see which "
        "tokens deviate, and then replaces 15 % of them: it computes as much as full prefill, "
        "and keeps the deviating rest. Keys that were computed at another position are not "
        "rotated. What it stores after a prompt is computed piece by piece, without the text "
        "before, so `prefix` is an approximation, too, as soon as it finds more than one piece: "
        "the same text, asked again, may get another answer than from its full prefill. "
        "Its own `ttft_ms` begins after the repair; here the time begins with the call.",
    ),
}


def page(
    where: str, command: str, workload: str, measured: Sequence[Measured], rows: Sequence[Row]
) -> str:
    """The whole page, in Markdown."""
    parts = [INTRODUCTION, f"`{command}` on {where}\n", f"{workload}\n"]
    parts += ["## Times and agreement\n", results_table(rows), COLUMNS]
    parts += [verdict(rows), "## What each needs\n", needs_table(measured)]
    parts.append(
        "*Memory* is the peak resident size of the process over the whole run, including loading "
        "and, for llama.cpp, three contexts; memory-mapped files count. *Disk* is the size of the "
        "installed packages that the system needs, without optional ones.\n"
    )
    parts.append("## The systems\n")
    parts += [paragraph(one, [r for r in rows if r.system == one.system]) for one in measured]
    return "\n".join(parts)


def command_line(arguments: Sequence[str]) -> str:
    """The command with the options that affect the numbers, and files without their folders."""
    shown, skip = ["python -m bench.peers"], False
    for argument in arguments:
        if skip or argument.split("=")[0] in PLACES:
            skip = not skip and "=" not in argument
        else:
            shown.append(argument.rstrip("/").rpartition("/")[2])
    return " ".join(shown)


def results_table(rows: Sequence[Row]) -> str:
    heads = ["system, mode", "TTFT ms", "than own full", "than best full", "again ms", "computed"]
    heads += ["first token", "tokens", "F1"]
    return table(heads, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    exact = row.mode.name == row.mode.full
    agreement = (
        ["–", "–", "–"]
        if exact
        else [f"{row.first_same:.0%}", f"{row.tokens_same:.0%}", f"{row.f1:.2f}"]
    )
    return [
        f"{TEXTS[row.system].title}, `{row.mode.name}`",
        f"{1e3 * row.ttft_s:,.0f}",
        f"{row.own_ratio:.2f}",
        f"{row.best_ratio:.2f}",
        "–" if row.again_s is None else f"{1e3 * row.again_s:,.0f}",
        "–" if row.computed is None else f"{row.computed:,.0f}",
        *agreement,
    ]


def verdict(rows: Sequence[Row]) -> str:
    """Where another system is faster than ragcache, from the numbers."""
    ours = [row for row in rows if row.system == "ragcache"]
    others = [row for row in rows if row.system != "ragcache"]
    if not ours or not others:
        return ""
    full = next(row for row in ours if row.mode.name == "full")
    lines = []
    faster = [r for r in others if r.mode.name == r.mode.full and r.ttft_s < full.ttft_s]
    lines += [
        f"- Full prefill: {_name(r)} takes {1e3 * r.ttft_s:,.0f} ms, ragcache "
        f"{1e3 * full.ttft_s:,.0f} ms."
        for r in faster
    ]
    for mine in ours:
        if mine.mode.name not in ("full", "prefix"):
            lines += [
                f"- {_name(r)} answers sooner than ragcache's `{mine.mode.name}`: "
                f"{1e3 * r.ttft_s:,.0f} ms against {1e3 * mine.ttft_s:,.0f} ms; "
                f"{r.tokens_same:.0%} of its tokens are those of its full prefill, against "
                f"{mine.tokens_same:.0%}."
                for r in others
                if r.mode.name != r.mode.full and r.ttft_s < mine.ttft_s
            ]
    best = min((r for r in ours if r.again_s is not None), key=lambda r: r.again_s or 0.0)
    lines += [
        f"- When the same chunks come again in the same order, {_name(r)} takes "
        f"{1e3 * (r.again_s or 0.0):,.0f} ms, and ragcache's fastest mode, `{best.mode.name}`, "
        f"{1e3 * (best.again_s or 0.0):,.0f} ms."
        for r in others
        if r.again_s is not None and r.again_s < (best.again_s or 0.0)
    ]
    told = "\n".join(lines) if lines else "- In none of these rows."
    return f"Where another system is faster than ragcache:\n\n{told}\n"


def needs_table(measured: Sequence[Measured]) -> str:
    heads = ["system", "versions", "packages", "disk MiB", "memory MiB", "start s", "GPU"]
    heads += ["change of the prompt"]
    rows = []
    for one in measured:
        text = TEXTS[one.system]
        if (loaded := one.loaded) is None:
            rows.append([text.title, *["–"] * 7])
            continue
        versions = ", ".join(f"{name} {version}" for name, version in loaded.versions.items())
        changes = {mode.prompt for mode in loaded.modes} - {"as it is"}
        rows.append(
            [
                text.title,
                versions,
                f"{loaded.packages}",
                f"{loaded.disk_mib:,}",
                f"{one.peak_mib:,}",
                f"{one.load_s:.0f}",
                text.gpu,
                "; ".join(sorted(changes)) or "none",
            ]
        )
    return table(heads, rows)


def paragraph(one: Measured, rows: Sequence[Row]) -> str:
    text = TEXTS[one.system]
    parts = [f"### {text.title}\n", f"{text.does}\n"]
    if one.error:
        parts.append(f"**Not measured{' to the end' if rows else ''}**: {one.error}\n")
    if one.loaded is not None and rows:
        told = ", ".join(
            f"`{r.mode.name}` {1e3 * r.ttft_s:,.0f} ms ({r.own_ratio:.2f} times sooner than "
            "its own full prefill)"
            if r.mode.name != r.mode.full
            else f"`{r.mode.name}` {1e3 * r.ttft_s:,.0f} ms"
            for r in rows
        )
        parts.append(f"Measured: {told}. Settings: {one.loaded.settings}.\n")
    parts.append(f"Limits: {text.cannot}\n")
    return "\n".join(parts)


def _name(row: Row) -> str:
    return f"{TEXTS[row.system].title}, `{row.mode.name}`,"
