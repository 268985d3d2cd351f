"""What ocvtp_paper.yaml calls."""

from __future__ import annotations

from typing import Any


def mmbench(results: list[dict[str, Any]]) -> float:
    """MMBench's circular accuracy in percent, by rules alone.

    lmms-eval's own aggregation asks GPT about answers it can't read, and without a key waits for minutes and
    then draws one at random; it also writes an Excel sheet for the submission server.
    """
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    overall, _, _ = MMBench_Evaluator().eval_result(results, eval_method="static")
    return 100 * float(overall)
