"""The private parts of Hydra that this package uses. `setup.cfg` therefore requires one exact version of Hydra."""

from collections.abc import Sequence

# The public functions, `hydra.initialize_config_dir` and `hydra.compose`, keep global state, which would clash with the
# state of a notebook that uses Hydra too, and they search a user's folder after the package's. The private loader and
# search path do neither. Without them, no verb of `gemma2` that takes key=value works.
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig


def load_configuration(places: Sequence[tuple[str, str]], name: str, overrides: list[str]) -> DictConfig:
    """Composes the file `name` with the files that the overrides choose from the groups.

    Args:
        places: pairs of a provider's name and an address (`file://…`, `pkg://…`, `structured://`); a file is taken
            from the first place that has it.

    Raises:
        HydraException, OmegaConfBaseException: a file is missing or broken.
    """
    Plugins.instance()  # as a side effect, registers Hydra's own kinds of sources
    search = ConfigSearchPathImpl()
    for provider, address in places:
        search.append(provider, address)
    return ConfigLoaderImpl(search).load_configuration(name, overrides, RunMode.RUN, from_shell=False)
