"""Skips that no machine of ours lifts. The end of a run counts them in one line, and names all
others."""
import collections

# how a reason begins -> what would run the test; "": a parameter has no such case
LIFTED_BY = {
    "needs a GPU": "a GPU of NVIDIA or AMD, where `dev.py gpu` runs them",
    "no hiprtc here": "a ROCm with its hiprtc",
    "needs clang": "Clang 19 or later, as the variable CLANG names it",
    "needs actionlint": "the program of that name, which no package index has",
    "needs AVX512-BF16 without AMX": "a CPU that has it, or `dev.py test --heavy`, which hides AMX",
    "COMFYUI_GGUF_PATH names no clone of ComfyUI-GGUF": "such a clone, which no test fetches",
    "could not import 'stable_diffusion_cpp": "that package, compiled for a quarter of an hour",
    "needs transformers 5.15": "it, which the pinned ComfyUI does not take",
    "ComfyUI cannot train": "a ComfyUI that trains models of two latents",
    **dict.fromkeys((
        "ComfyUI's own loader has dropped the marks and scales",
        "its writer does not take widths of this model", "a format does not hold the shape",
        "multiplies fewer rows", "left to torch", "is compared with", "has no word for it",
        "the package wants whole groups", "no family has its layers",
        "it is a name of the other encoder", "this shape has no helper"), ""),
}


def summary(reports) -> list[str]:
    """Returns lines that say how many tests were skipped, and why, the most first."""
    reasons = collections.Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in reports
        if isinstance(report.longrepr, tuple))
    known: dict[str, int] = collections.Counter()
    lines = []
    for reason, count in reasons.most_common():
        begins = [begin for begin in LIFTED_BY if reason.startswith(begin)]
        if begins:
            known[LIFTED_BY[begins[0]] and begins[0]] += count
        else:
            lines.append(f"{count} skipped: {reason}")
    without_case = known.pop("", 0)
    if known:
        lines.append(f"{sum(known.values())} skipped as on any machine of ours: " + ", ".join(
            f"{reason} ({count})" for reason, count in known.items()))
    if without_case:
        lines.append(f"{without_case} skipped: parameters without such a case")
    return lines
