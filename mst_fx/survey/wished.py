"""What the user wants for a region, by the options and the modules that its nodes belong to."""

from __future__ import annotations

from mst_fx.core.config import SMALL_BYTES, Config, Wish
from mst_fx.core.module_paths import module_names
from mst_fx.core.values import bytes_of, tensors_of
from mst_fx.recognise.region import Region


def wish_for(region: Region, config: Config) -> Wish:
    """Return the user's wish for a region; the nodes of its front do not count."""
    modules = set[str]().union(*(module_names(node) for node in region.nodes if node not in region.front))
    return config.wish_for(modules) if region.over == "tokens" else config.wish_over_heads(modules)


def is_beneath_notice(region: Region, config: Config) -> bool:
    """Return whether a region over heads is small, or not wanted: any graph with attention has one."""
    if region.over == "tokens":
        return False
    wish = wish_for(region, config)
    small = sum(bytes_of(x) for node in region.nodes for x in tensors_of(node)) < SMALL_BYTES
    return small if wish.loop is None else not wish.loop
