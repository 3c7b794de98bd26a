"""Checks for optional packages, made before the slow steps: data preparation and compilation."""

from gemma2_jax.compilation import check_compilation_cache
from gemma2_jax.formats import hub
from gemma2_jax.kernels import tokamax_attention
from gemma2_jax.run import RunConfig
from gemma2_jax.training.metrics import check_trackers


def check_packages(config: RunConfig) -> None:
    """Raises UserError if a run needs a package that is not installed.

    (The package for Parquet files is checked later, when the files of `data.source` are listed.)
    """
    check_trackers(config.metrics)
    if config.compilation_cache is not None:
        check_compilation_cache(config.compilation_cache)
    if config.compute.attention.kernel == "tokamax":
        tokamax_attention.check_tokamax_installed()
    for path in (config.distill.teacher, config.initialise.source):
        if path is not None:
            hub.check_hub_installed(path)
