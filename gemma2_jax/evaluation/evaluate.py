"""Evaluates checkpoints of any kind on text or prepared data."""

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import gemma2_jax
from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.rows import check_rows
from gemma2_jax.evaluation.config import EvaluationConfig
from gemma2_jax.evaluation.domains import Domain, PreparedDomain, open_domains
from gemma2_jax.evaluation.evaluated_model import (
    EvaluatedModel,
    find_run_data,
    open_models,
    open_teacher_of,
    run_data_of,
)
from gemma2_jax.evaluation.evaluation_progress import EvaluationProgress
from gemma2_jax.evaluation.memorisation import Memorisation, long_enough, memorised, result_of
from gemma2_jax.evaluation.record import (
    FORMAT,
    DomainMemorisation,
    DomainScores,
    EvaluationRecord,
    EvaluationRow,
)
from gemma2_jax.evaluation.scores import Scoring, add_sums, build_scoring, score, scores_of
from gemma2_jax.evaluation.windows import DOCUMENT, PACKED, SLIDING, Window, batches_of, windows_of
from gemma2_jax.methods.distillation import TEACHER
from gemma2_jax.methods.language_modelling import MODEL
from gemma2_jax.model.counts import bytes_per_token
from gemma2_jax.model.quantised import weight_bytes
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import fallbacks, weight_specs
from gemma2_jax.sampling.sampler import Sampler
from gemma2_jax.sharding.feeding import feeding_share
from gemma2_jax.sharding.layout import batch_shares, laid_out
from gemma2_jax.sharding.mesh import build_mesh

_CONTEXT, _BATCH = 2048, 8  # of evaluations whose input gives none


def evaluate(
    checkpoints: str | Path | Sequence[str | Path],
    config: EvaluationConfig = EvaluationConfig(),
    show: bool = False,
) -> EvaluationRecord:
    """Evaluates checkpoints of any kind on the same text, one after another.

    Args:
        checkpoints: one or several; each is a row of the results.
        config: what they are evaluated on, and how; by default, the validation split of the first run's own data.
        show: whether to show progress on standard error.

    Returns:
        The record, with a row for each checkpoint, adapter and format of the weights.

    Raises:
        UserError: a checkpoint, an adapter or the text cannot be read; a tokenizer is another one than the teacher's or
            the prepared data's; or the batch does not fit the mesh.
    """
    several = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
    models = open_models([str(path) for path in several], config)
    mesh = build_mesh(config.mesh)
    with jax.set_mesh(mesh), laid_out(config.layout):
        return _Evaluator(models, config, mesh).run(show)


class _Evaluator:
    """What the rows of one evaluation share."""

    def __init__(self, models: Sequence[EvaluatedModel], config: EvaluationConfig, mesh: Mesh) -> None:
        self._began = time.monotonic()
        self._models, self._config, self._mesh = models, config, mesh
        first = models[0].path
        owns_data = not config.text and config.data is None
        run_data = run_data_of(first) if owns_data else find_run_data(first)
        self._context = config.context or (run_data.seq_len if run_data else _CONTEXT)
        self._stride = {
            DOCUMENT: self._context,
            SLIDING: config.stride or max(1, self._context // 2),
            PACKED: None,
        }[config.kind]
        if self._stride is not None and self._stride > self._context:
            raise UserError(
                f"evaluation.stride is {self._stride}; it must be at most evaluation.context ({self._context}), or "
                "tokens between two windows would not be scored."
            )
        self._batch = self._checked_batch()
        self._share = feeding_share(mesh)
        if config.memorisation and jax.process_count() > 1:
            raise UserError("evaluation.memorisation needs a single process; leave it out, or use one host.")
        self._domains = open_domains(config, run_data, self._context, self._batch)
        for model in models:
            for domain in self._domains:
                domain.check(model.tokenizer, model.name)
        self._teacher = open_teacher_of(models, config)
        self._loaded_teacher: Gemma2 | None = None

    def run(self, show: bool) -> EvaluationRecord:
        config = self._config
        scoring = build_scoring(config.compute, config.block_tokens)
        with EvaluationProgress(len(self._models) * len(self._domains), show) as progress:
            rows = tuple(self._row(model, scoring, progress) for model in self._models)
            progress.doing("identifying weights")
            teacher = None if self._teacher is None else self._teacher.describe()
        devices = self._mesh.devices.flat
        return EvaluationRecord(
            format=FORMAT,
            versions={
                "gemma2_jax": gemma2_jax.__version__,
                "jax": version("jax"),
                "python": platform.python_version(),
            },
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            devices=f"{self._mesh.size} x {devices[0].device_kind}",
            mesh={axis: size for axis, size in self._mesh.shape.items() if size > 1},
            dtype=config.compute.dtype,
            domains={domain.name: domain.place for domain in self._domains},
            windows=config.kind,
            context=self._context,
            stride=self._stride,
            batch=self._batch,
            limit=config.limit,
            teacher=teacher,
            seconds=time.monotonic() - self._began,
            rows=rows,
        )

    def _row(self, opened: EvaluatedModel, scoring: Scoring, progress: EvaluationProgress) -> EvaluationRow:
        began = time.monotonic()
        progress.doing(f"loading {opened.name}")
        dtype = self._config.compute.dtype
        models = {MODEL: opened.load(dtype, self._mesh)}
        if self._teacher is not None:
            models[TEACHER] = self._teacher_for(models[MODEL])
        sums = {
            domain.name: self._scored(domain, opened, models, scoring, progress) for domain in self._domains
        }
        memorisation = self._memorisation(opened, models[MODEL], progress)
        progress.doing(f"identifying {opened.name}")
        config, size = models[MODEL].config, weight_bytes(models[MODEL].params())
        return EvaluationRow(
            name=opened.name,
            checkpoint=opened.describe(),
            seconds=time.monotonic() - began,
            scores={
                self._config.kind: DomainScores(
                    {name: scores_of(found) for name, found in sums.items()},
                    scores_of(add_sums(list(sums.values()))),
                )
            },
            memorisation=memorisation,
            weight_bytes=size,
            bytes_per_token=bytes_per_token(config, size, self._context, jnp.dtype(dtype).itemsize),
            fallbacks=tuple(fallbacks(weight_specs(config), opened.format)) if opened.format else (),
        )

    def _scored(
        self,
        domain: Domain,
        opened: EvaluatedModel,
        models: Mapping[str, Gemma2],
        scoring: Scoring,
        progress: EvaluationProgress,
    ) -> dict[str, Any]:
        """Returns the sums of the scores on one domain. Raises UserError if it has no token to score."""
        progress.doing(f"evaluating {opened.name} on {domain.name}")
        batches = self._batches(domain, opened.tokenizer, progress)
        first = next(batches, None)
        if first is None:
            raise UserError(f"{domain.place} holds no token that is to be scored; give other text or data.")
        shown = progress.counted(chain([first], batches), self._share[1])
        sums = score(scoring, models, shown, opened.tokenizer.byte_lengths(), self._mesh)
        progress.finish_part()
        return sums

    def _checked_batch(self) -> int:
        """Rows in a batch, checked against the mesh."""
        shares = batch_shares(self._mesh)
        batch = self._config.batch or -(-_BATCH // shares) * shares
        try:
            check_rows(batch, self._context, self._mesh, "evaluation.batch")
        except UserError as error:
            raise UserError(str(error).replace("data.seq_len", "evaluation.context")) from None
        return batch

    def _teacher_for(self, model: Gemma2) -> Gemma2:
        """The teacher with the model's padding of the vocabulary, loaded again only if that has changed."""
        assert self._teacher is not None
        padding = model.config.vocab_size, model.config.vocab_padding
        loaded = self._loaded_teacher
        if loaded is None or (loaded.config.vocab_size, loaded.config.vocab_padding) != padding:
            self._loaded_teacher = None  # frees the memory first
            loaded = self._teacher.load(self._config.compute.dtype, self._mesh, model.config)
            self._loaded_teacher = loaded
        return loaded

    def _batches(self, domain: Domain, tokenizer: Tokenizer, progress: EvaluationProgress) -> Iterator[Batch]:
        limit = self._config.limit
        if self._stride is None:
            assert isinstance(domain, PreparedDomain)
            return domain.batches(*self._share, limit, progress.read)
        windows = self._windows(domain, tokenizer, progress)
        return batches_of(windows, self._context, self._batch, *self._share)

    def _windows(
        self, domain: Domain, tokenizer: Tokenizer, progress: EvaluationProgress
    ) -> Iterator[Window]:
        limit, stride = self._config.limit, self._stride
        assert stride is not None
        documents = domain.documents(tokenizer, progress.read)
        for number, (ids, scored) in enumerate(islice(documents, limit), 1):
            if limit is not None:
                progress.read(number / limit)
            yield from windows_of(ids, scored, tokenizer.bos_id, self._context, stride)

    def _memorisation(
        self, opened: EvaluatedModel, model: Gemma2, progress: EvaluationProgress
    ) -> DomainMemorisation | None:
        limit = self._config.memorisation
        if not limit:
            return None
        sampler = Sampler(model, opened.tokenizer, self._config.compute)
        found: dict[str, Memorisation] = {}
        for domain in self._domains:
            progress.doing(f"testing what {opened.name} has memorised of {domain.name}")
            documents = long_enough(domain.prompts(opened.tokenizer), limit)
            found[domain.name] = memorised(
                sampler.generate_tokens, opened.tokenizer.bos_id, documents, self._batch
            )
        counts: list[Any] = [(each.documents, each.exact, each.approximate) for each in found.values()]
        return DomainMemorisation(found, result_of(*map(sum, zip(*counts, strict=True))))
