"""Tasks of lmms-eval: the paper's benchmarks as one group, ``ocvtp_paper``, without judges and servers.

lmms-eval finds them with ``--include_path "$(python -m ocvtp.harness.tasks)"``.
"""

from __future__ import annotations

from pathlib import Path

#: For ``--include_path``.
FOLDER = Path(__file__).parent
