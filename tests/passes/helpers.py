"""Before and after, as text."""

from textwrap import dedent

from torch import nn
from torch.fx import GraphModule

from brfx.graph.trace import trace
from brfx.graph.utils import dump
from brfx.prepare import Pass, apply


def assert_rewrites(model: nn.Module, rewrite: Pass, before: str, after: str, sites: int) -> GraphModule:
    """``rewrite`` takes the graph from ``before`` to ``after``, says how many sites it changed, and is idempotent."""
    gm = trace(model)
    assert dump(gm) == dedent(before).strip()
    assert rewrite(gm) == sites
    apply(gm, [])
    assert dump(gm) == dedent(after).strip()
    assert rewrite(gm) == 0
    assert dump(gm) == dedent(after).strip()
    return gm
