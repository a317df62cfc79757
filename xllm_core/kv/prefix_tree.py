"""Which prefixes are known: one tree of token blocks for all KV groups.

A node is one block of tokens after all the blocks above it; for each group it names the device block that holds its KV, or
none. A node's key covers its ancestors (keys.py), so one flat table finds it and an equal key means an equal prefix.

A node lives while a group has a block there, a child hangs below, or someone pins it (the tail of a running sequence, the
target of a load). Pinning keeps the path of a sequence connected while blocks of it are evicted.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.errors import IntegrityError
from xllm_core.kv.keys import ROOT_KEY


class Node:
    """One block of tokens. blocks[g]: device block of group g, None where that group has none. depth: blocks up to and with it.

    num_loads: loads in flight that will bring a block here. storage_keys: by part, None until one is asked for (transfer.py).
    """

    __slots__ = ("blocks", "depth", "key", "num_children", "num_loads", "num_pins", "parent", "storage_keys")

    def __init__(self, key: bytes, parent: Node | None, num_groups: int) -> None:
        self.key = key
        self.parent = parent
        self.depth: int = parent.depth + 1 if parent is not None else 0
        self.blocks: list[int | None] = [None] * num_groups
        self.num_children = 0
        self.num_pins = 0
        self.num_loads = 0
        self.storage_keys: dict[str, bytes] | None = None

    def __repr__(self) -> str:
        return f"Node({self.key.hex()[:8]}, depth={self.depth}, blocks={self.blocks}, pins={self.num_pins})"


class PrefixTree:
    """All nodes of one engine. `generation` grows whenever a block leaves a node: what was found before may be gone."""

    __slots__ = ("generation", "nodes", "num_groups", "root")

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self.nodes: dict[bytes, Node] = {}
        self.root = Node(ROOT_KEY, None, num_groups)
        self.generation = 0

    def match(self, keys: Iterable[bytes]) -> list[Node]:
        """The nodes of a chain of keys, up to the first that is unknown; takes nothing from `keys` after that."""
        path: list[Node] = []
        for key in keys:
            node = self.nodes.get(key)
            if node is None:
                break
            path.append(node)
        return path

    def extend(self, parent: Node, key: bytes) -> Node:
        """The child of `parent` with this key, made if it is new. Pin it, or give it a block, before anything is evicted."""
        node = self.nodes.get(key)
        if node is None:
            node = self.nodes[key] = Node(key, parent, self.num_groups)
            parent.num_children += 1
        return node

    def pin(self, node: Node) -> None:
        """Keep a node although it may have no block and no child."""
        node.num_pins += 1

    def unpin(self, node: Node) -> None:
        """Undo one `pin`."""
        if node.num_pins < 1:
            raise IntegrityError(f"{node} is unpinned more often than pinned")
        node.num_pins -= 1
        if not node.num_pins and not node.num_children:
            self._prune(node)

    def attach(self, node: Node, group: int, block: int) -> None:
        """Name the device block of a group at a node that has none."""
        if node.blocks[group] is not None:
            raise IntegrityError(f"{node} has a block of group {group} already and is given block {block}")
        node.blocks[group] = block

    def detach(self, node: Node, group: int) -> None:
        """Forget the block of a group: it was evicted or withdrawn."""
        node.blocks[group] = None
        self.generation += 1
        self._prune(node)

    def clear(self) -> None:
        """Forget every node. The caller has dropped every path and pin it kept."""
        self.nodes.clear()
        self.root = Node(ROOT_KEY, None, self.num_groups)
        self.generation += 1

    def check_integrity(self) -> None:
        """Parents, child counts and reasons to live agree. Raises IntegrityError."""
        num_children: dict[bytes, int] = {}
        for key, node in self.nodes.items():
            parent = node.parent
            if (
                parent is None
                or key != node.key
                or (parent is not self.root and self.nodes.get(parent.key) is not parent)
            ):
                raise IntegrityError(f"{node} hangs in the tree without its parent {parent}")
            num_children[parent.key] = num_children.get(parent.key, 0) + 1
        for node in (self.root, *self.nodes.values()):
            if node.num_children != num_children.get(node.key, 0):
                raise IntegrityError(
                    f"{node} counts {node.num_children} children, the tree has {num_children.get(node.key, 0)}"
                )
            if node is not self.root and self._is_idle(node):
                raise IntegrityError(f"{node} has no block, no child and no pin, and is still in the tree")

    def _prune(self, node: Node) -> None:
        while node.parent is not None and self._is_idle(node):
            del self.nodes[node.key]
            node.parent.num_children -= 1
            node = node.parent

    @staticmethod
    def _is_idle(node: Node) -> bool:
        return not node.num_children and not node.num_pins and all(block is None for block in node.blocks)
