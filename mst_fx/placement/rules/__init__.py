"""The placement rules: for each aten op, the placement of its result, given the placements of its operands.

Each file has the rules of some families of ops; an op with the tag `pointwise` needs no entry. Importing this package
fills the table of rules.
"""

from mst_fx.placement.rules import attention as attention
from mst_fx.placement.rules import collectives as collectives
from mst_fx.placement.rules import contraction as contraction
from mst_fx.placement.rules import creation as creation
from mst_fx.placement.rules import indexing as indexing
from mst_fx.placement.rules import loss as loss
from mst_fx.placement.rules import moves_along_dims as moves_along_dims
from mst_fx.placement.rules import own_gradients as own_gradients
from mst_fx.placement.rules import pointwise as pointwise
from mst_fx.placement.rules import reduction as reduction
from mst_fx.placement.rules import view as view
from mst_fx.placement.rules import writing as writing
from mst_fx.placement.rules.collectives import even_parts as even_parts
from mst_fx.placement.rules.counting import made_for_counts as made_for_counts
from mst_fx.placement.rules.indexing import positions_of as positions_of
from mst_fx.placement.rules.linear import casts as casts
from mst_fx.placement.rules.linear import is_linear as is_linear
from mst_fx.placement.rules.own_gradients import check_gradients as check_gradients
from mst_fx.placement.rules.own_gradients import scales_with_upstream as scales_with_upstream
from mst_fx.placement.rules.own_gradients import tied_to_chunks as tied_to_chunks
from mst_fx.placement.rules.registry import Demand as Demand
from mst_fx.placement.rules.registry import NodePlacement as NodePlacement
from mst_fx.placement.rules.registry import Spans as Spans
from mst_fx.placement.rules.registry import args_of as args_of
from mst_fx.placement.rules.registry import argument as argument
from mst_fx.placement.rules.registry import demands_of as demands_of
from mst_fx.placement.rules.registry import mixed as mixed
from mst_fx.placement.rules.registry import rule_for as rule_for
from mst_fx.placement.rules.registry import shape_of as shape_of
from mst_fx.placement.rules.registry import takes as takes
from mst_fx.placement.rules.routing import count as count
from mst_fx.placement.rules.routing import inverted as inverted
from mst_fx.placement.rules.routing import route as route
