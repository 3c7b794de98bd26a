"""What this package uses of Hydra's private modules. `setup.cfg` therefore requires one exact version of Hydra."""

from collections.abc import Sequence

# Hydra's public way to compose, `hydra.compose` after `hydra.initialize_config_dir`, keeps its state in a global, of
# which a notebook may have its own, and searches a user's folder behind the package's. Its loader and search path by
# themselves do neither. Without them no configuration can be composed, and so no verb of `gemma2` that takes key=value
# works.
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig


def load_configuration(places: Sequence[tuple[str, str]], name: str, overrides: list[str]) -> DictConfig:
    """Composes the file `name` with the groups that the overrides choose.

    Args:
        places: a provider's name and an address (`file://…`, `pkg://…`, `structured://`) each; the first that has a
            file wins.

    Raises:
        HydraException, OmegaConfBaseException: a file is missing or broken.
    """
    Plugins.instance()  # as a side effect, makes Hydra's own kinds of sources known
    search = ConfigSearchPathImpl()
    for provider, address in places:
        search.append(provider, address)
    return ConfigLoaderImpl(search).load_configuration(name, overrides, RunMode.RUN, from_shell=False)
