"""This project's training step as a contender of the DPO step benchmark.

SETTING is LAYOUT-DTYPE: rows are packed, each prompt once, or padded; products are in float32 or
bfloat16. Reference log-probs are computed once, by the program that scores.
"""

from __future__ import annotations

CHUNK, REMAT = 512, 'all'
