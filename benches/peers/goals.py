"""What was set out for, and whether it was reached. Numbers in, verdicts out."""

from dataclasses import dataclass

# What stands in a result: at least so much, or at most.
AT_LEAST, AT_MOST = "at least", "at most"


@dataclass(frozen=True)
class Goal:
    name: str
    bound: str
    value: float
    unit: str

    def verdict(self, found):
        if found is None:
            return "not measured"
        reached = found >= self.value if self.bound == AT_LEAST else found <= self.value
        return "reached" if reached else "MISSED"


GOALS = {
    "path_a": Goal("linears by path A of torch.matmul, the least of all shapes", AT_LEAST, 0.93, "x dense"),
    "path_b": Goal("linears by path B of torch.matmul, the least of all shapes", AT_LEAST, 0.85, "x dense"),
    "path_b_peers": Goal("path B, by the fastest of Marlin, humming and torch int4", AT_LEAST, 1.0, "x as fast"),
    "decode": Goal("decoding, bytes read and written", AT_LEAST, 3.5, "TB/s"),
    "attention_2048": Goal("attention of torch SDPA, heads of 128, windows of 2048", AT_LEAST, 0.6, "x SDPA"),
    "attention_8192": Goal("attention of torch SDPA, heads of 128, windows of 8192", AT_LEAST, 0.6, "x SDPA"),
    "model": Goal("8B W4A16, windows of 2048", AT_LEAST, 38_000, "tokens/s"),
    "model_dense": Goal("of transformers, bf16 dense at its best batch", AT_LEAST, 1.0, "x as fast"),
    "model_packed": Goal("of transformers with compressed-tensors", AT_LEAST, 3.0, "x as fast"),
    "windows": Goal("73 windows of an 8B model, after loading", AT_MOST, 10.0, "s"),
    "stream": Goal("123B from host memory by the resident speed, 20 windows", AT_LEAST, 0.7, "x resident"),
    "memory": Goal("peak device memory of 8B W4A16 beyond packed weights", AT_MOST, 2.0, "GiB"),
}


def table(found):
    """Every goal beside what was found; what no part has measured says so."""
    lines = ["| goal | target | found | |", "|---|---|---|---|"]
    for key, goal in GOALS.items():
        value = found.get(key)
        shown = "-" if value is None else f"{value:,.2f} {goal.unit}"
        lines.append(f"| {goal.name} | {goal.bound} {goal.value:,g} {goal.unit} | {shown} | {goal.verdict(value)} |")
    return "\n".join(lines)
