"""Int8 with one scale a row: bitsandbytes' (LLM.int8, https://arxiv.org/abs/2208.07339).

Sources: bitsandbytes 0.50 `nn/modules.py` (`SCB`), `backends/default/ops.py`
(`int8_vectorwise_quant`). The scale is the largest magnitude of the row (`SCB`) over 127.
"""
from .row_layout import INT8_CODES, RowFamily, RowLayout

INT8 = RowFamily("INT8", lambda columns: RowLayout(columns, INT8_CODES))
