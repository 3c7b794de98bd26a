"""Measures how important each input of a matrix is on data: the mean square of the activations that enter it.

If activations are uncorrelated, the expected squared error of a product's output is the sum over the inputs of the
weight's squared error times this mean square. The K types of GGUF (`formats/k_quants.py`) minimise this sum.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.evaluation.config import EvaluationConfig
from gemma2_jax.evaluation.domains import Domain, open_domains
from gemma2_jax.evaluation.windows import batches_of, windows_of
from gemma2_jax.formats.gguf import Importance
from gemma2_jax.formats.load import load_tokenizer, model_of
from gemma2_jax.formats.source import WeightSource
from gemma2_jax.model.transformer import Block, Collector, Gemma2, Taps
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh

_CONTEXT, _BATCH, _BATCHES = 512, 4, 16  # at most 32,768 tokens
# The matrices that each activation enters.
_ENTERED = {
    "attention_input": ("attn_q", "attn_k", "attn_v"),
    "heads": ("attn_output",),
    "mlp_input": ("ffn_gate", "ffn_up"),
    "mlp_hidden": ("ffn_down",),
}


class Calibration:
    """The importance of a model's inputs on some data, for `formats.convert.convert`.

    Args:
        data: globs of text files as `data.source`, or a folder of prepared data, whose training split is used.

    Raises:
        UserError: there is no such data.
    """

    def __init__(self, data: str) -> None:
        self._data = data
        config = EvaluationConfig(data=data) if Path(data).is_dir() else EvaluationConfig(text=(data,))
        self._domains: list[Domain] = self._named(lambda: open_domains(config, None, _CONTEXT, _BATCH))

    def __call__(self, source: WeightSource) -> Importance:
        """Returns the importance [n] of the n inputs of each matrix, by the tensor's name in GGUF.

        Raises:
            UserError: the data has another tokenizer, or no text.
        """
        tokenizer = load_tokenizer(source)
        for domain in self._domains:
            self._named(lambda domain=domain: domain.check(tokenizer, str(source.path)))
        mesh = build_mesh(MeshConfig(), jax.local_devices()[:1])
        model = model_of(source, source.dtype, mesh)
        step = jax.jit(_sums)
        total: Any = None
        with jax.set_mesh(mesh):
            for batch in islice(self._batches(tokenizer), _BATCHES):
                sums = step(model, batch)
                total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        if total is None:
            raise UserError(f"--calibrate {self._data} holds no text; give files that do.")
        return _by_tensor(jax.tree.map(np.asarray, total))

    def _batches(self, tokenizer: Tokenizer) -> Iterator[Batch]:
        def windows() -> Iterator[Any]:
            for domain in self._domains:
                for ids in domain.prompts(tokenizer):
                    yield from windows_of(ids, np.ones(len(ids), bool), tokenizer.bos_id, _CONTEXT, _CONTEXT)

        return batches_of(windows(), _CONTEXT, _BATCH)

    def _named(self, call: Any) -> Any:
        """Returns the result of `call`, whose errors name --calibrate."""
        try:
            return call()
        except UserError as error:
            message = re.sub(r"(evaluation\.(text|data)|data\.(source|folder))", "--calibrate", str(error))
            raise UserError(message) from None


def _sums(model: Gemma2, batch: Batch) -> tuple[dict[str, dict[str, jax.Array]], jax.Array, jax.Array]:
    """Sums of squares over the tokens of a batch, by kind of block and tap, and of the final hidden states; tokens."""
    real = (batch.segment_ids > 0).astype(jnp.float32)
    final, blocks = model.collect(_Squares(real), batch.tokens, batch.positions, batch.segment_ids)
    return blocks, _sum_of_squares(real, final), jnp.sum(real)


@dataclass(frozen=True)
class _Squares(Collector):
    """Sums the squares of the activations that enter matrices; `real`: [B, T], 1 on tokens and 0 on padding."""

    real: jax.Array

    def of_block(self, block: Block, taps: Taps) -> dict[str, jax.Array]:
        return {name: _sum_of_squares(self.real, taps[name]) for name in _ENTERED}


def _sum_of_squares(real: jax.Array, x: jax.Array) -> jax.Array:
    """The squares of x [B, T, ...], summed over the tokens that are not padding: [n], its last axes merged."""
    flat = x.reshape(*x.shape[:2], -1).astype(jnp.float32)
    return jnp.einsum("BT,BTX->X", real, jnp.square(flat))


def _by_tensor(sums: tuple[dict[str, dict[str, np.ndarray]], np.ndarray, np.ndarray]) -> Importance:
    blocks, final, tokens = sums
    found = {"token_embd.weight": final / tokens}
    for kind, name in enumerate(("local_block", "global_block")):
        for tap, matrices in _ENTERED.items():
            for pair, values in enumerate(blocks[name][tap]):
                for matrix in matrices:
                    found[f"blk.{2 * pair + kind}.{matrix}.weight"] = values / tokens
    return found
