"""The optimiser step of csrc/adamw.cu: more parameters than one launch's table holds, of all sizes, also none."""

import numpy as np

from tests.cudacheck.family import Run, kernel_family
from tests.cudacheck.launchers import Array, Table

LR, BETA1, BETA2, EPS, DECAY, STEP, AVERAGE = 1e-2, 0.9, 0.99, 1e-8, 0.1, 3, 0.95
NAMES = ("parameter", "gradient", "m", "v", "average")


def _run(count: int, sizes: tuple[int, ...], averages: str, alignment: int) -> Run:
    rng = np.random.default_rng([count, *sizes])
    table, inputs, updated, expected = [], {}, {}, {}
    for i in range(count):
        p, g, m, v, a = (rng.standard_normal(sizes[i % len(sizes)]).astype(np.float32) for _ in NAMES)
        v = np.abs(v)
        averaged = averages == "all" or (averages == "some" and i % 2 == 0)
        arrays = {f"{name} {i}": array for name, array in zip(NAMES, (p, g, m, v, a)) if averaged or name != "average"}
        table += [Array(f"{name} {i}") if f"{name} {i}" in arrays else 0 for name in NAMES] + [p.size]
        inputs[f"gradient {i}"] = arrays.pop(f"gradient {i}")
        updated |= arrays
        p, g, m, v, a = (array.astype(float) for array in (p, g, m, v, a))
        m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
        p = p - LR * DECAY * p - LR * (m / (1 - BETA1**STEP)) / (np.sqrt(v / (1 - BETA2**STEP)) + EPS)
        answers = zip(NAMES, (p, None, m, v, a + (1 - AVERAGE) * (p - a)))
        expected |= {f"{n} {i}": (x, 2e-6 * (1 + np.abs(x))) for n, x in answers if f"{n} {i}" in arrays}
    numbers = [LR, BETA1, BETA2, EPS, DECAY, BETA1**STEP, BETA2**STEP, AVERAGE]
    return Run("adamw", [count, Table(table), *numbers, 0], inputs, {}, expected, updated=updated)


FAMILIES = [
    kernel_family(
        "adamw",
        ["adamw.cu"],
        {"count": (1, 3, 33), "sizes": ((1,), (255, 0, 7), (1024, 1025), (3, 2000)), "averages": ("none", "some", "all")},
        _run,
        typical=[{"count": 3, "sizes": (4096,), "averages": "all", "alignment": 4}],
    )
]
