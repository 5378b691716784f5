"""Where a config's sites are, in short."""

from typing import Any

import adapterkit as ak


def places(kit: ak.AdapterKit, config: Any, **settings: Any) -> list[tuple[str, tuple[str, ...]]]:
    return [(site.path, site.parameters) for site in kit.sites(config, **settings)]
