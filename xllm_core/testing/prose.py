"""A text for tests that want real words: about what the project does, in two languages and some code."""

from __future__ import annotations

PROSE = """A server that answers many people at once has one question to decide again and again: what shall the next pass over the
weights compute? A request that has just come brings a prompt of some length, and none of it has been computed. A request that has been
answered for a while has a single token that nobody has looked at yet. Both are the same thing seen from the right distance. Each sequence
has tokens it knows and tokens whose keys and values exist, and a step closes a part of the gap between them. Long prompts are cut into
pieces so that those who are already reading do not have to wait; short ones slip in beside them. When memory runs out, somebody has to
give back what was computed, and will compute it again later, and nobody should be able to tell from the answer that it happened.

That last sentence is the hard one. It is easy to be fast and slightly wrong. A block that was handed to somebody else while it was still being
read, a prefix that looked the same and was not, a random number drawn in a different order because a neighbour left early: each of them
changes a word somewhere in the middle of a long answer, and no alarm rings. So every feature is switched on and off and the answers are laid
side by side, token by token, until the first place where they part. If the two candidates were as good as tied, the arithmetic of the machine may
be excused. Otherwise something is broken, and it is better to know on the day it was written.

一个推理引擎的工作可以用一句话说清楚:在有限的显存里,让每一次对权重的遍历尽可能多地回答问题。请求到来,被切成小块,和别的请求一起计算;
内存不够的时候,有的请求要让出自己的位置,过一会儿再从头算起,而读答案的人不应该察觉到任何不同。我们把同样的问题在不同的条件下各问一遍,
再一个字一个字地比较答案,直到找到第一处差别。

def fibonacci(n: int) -> list[int]:
    values = [0, 1]
    while len(values) < n:
        values.append(values[-1] + values[-2])
    return values[:n]

for index, value in enumerate(fibonacci(20)):
    print(f"{index:>3} {value:>8}")

There were 3 tests in the morning, 14 at noon and 159 by the evening; the numbers 2, 71, 828 and 1828 appear in none of them. On the 22nd of
November the water stood 7.5 metres below the bridge, and by the time the ferry left at 18:45 it had risen by 30 centimetres. Prices are
given in euros: 12.50 for one, 23.00 for two, and 110 for a box of ten. Nobody remembers who planted the pear tree behind the mill, but
everybody in the village has an opinion on when it ought to be cut back, and they share it freely with anyone who stops to look at the blossoms.
"""
