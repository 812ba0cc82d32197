"""The benchmarks, a file each. Their texts and rules are those of the task definitions in lmms-eval 0.7.3."""

from crosslmm.evaluate.benchmarks import (
    egoschema,
    longvideobench,
    lvbench,
    mlvu,
    mvbench,
    nextqa,
    perceptiontest,
    tempcompass,
    videomme,
    vnbench,
)
from crosslmm.evaluate.questions.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for module in (
        videomme, mvbench, mlvu, longvideobench, lvbench, perceptiontest, egoschema, nextqa, tempcompass, vnbench
    )
    for benchmark in module.BENCHMARKS
}  # fmt: skip
