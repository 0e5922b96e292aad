"""Results that are the caller's alone: nothing that a program keeps for its backward lies in their memory.

Comes in: an emitted graph of which some result is kept, where the original's is not (torch normalizes, transposes or multiplies a copy).
Goes out: the same graph, each of its results a copy. Views among the results stay views of each other.
"""

from __future__ import annotations

import torch
import torch.fx

from fxfuse.functional import untracked_view

from .outputs import is_view

Node = torch.fx.Node


def own_results(graph: torch.fx.Graph) -> None:
    """Copy every result that is no input and no weight, in place.

    >>> graph = torch.fx.Graph()
    >>> h = graph.call_function(torch.tanh, (graph.placeholder("x"),))
    >>> _ = graph.output([h, graph.call_function(torch.exp, (h,))])
    >>> own_results(graph)
    >>> [node.name for node in graph.nodes]
    ['x', 'tanh', 'exp', 'clone', 'clone_1', 'output']
    """
    (output,) = graph.find_nodes(op="output")
    leaves = [leaf for leaf in dict.fromkeys(output.args[0]) if isinstance(leaf, Node)]
    shown = set(leaves)  # results, and what they are views of
    for node in reversed(graph.nodes):
        if node in shown and _shows(node):
            shown.add(node.all_input_nodes[0])
    copies: dict[Node, Node] = {}
    for node in [node for node in graph.nodes if node in shown]:
        with graph.inserting_before(output):
            if node.op in ("placeholder", "get_attr"):
                copies[node] = node
            elif _shows(node):
                copies[node] = graph.node_copy(node, lambda each: copies.get(each, each))
            else:
                copies[node] = graph.call_function(torch.clone, (node,))
                copies[node].meta = dict(node.meta)
    output.args = ([copies.get(leaf, leaf) if isinstance(leaf, Node) else leaf for leaf in output.args[0]],)


def _shows(node: Node) -> bool:
    """Is it a view, with its history or without?"""
    return is_view(node) or node.target is untracked_view
