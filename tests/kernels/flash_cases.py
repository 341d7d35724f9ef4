"""The shapes and masks that attention is tried with, over both back ends, in fp32 and fp16."""

from __future__ import annotations

from flash_oracle import Case
from hypothesis import strategies as st

DOCUMENTS = ((0, 30, 31, 31, 90, 90), (0, 50, 50, 50, 97, 97))  # lengths 30, 1, 0 and 59; the tail is padding
CASES = {
    "one": Case(T=1, S=1, H=1, K=1, D=1),
    "one, head dim 64": Case(T=1, S=1, D=64),
    "prime": Case(B=2, T=67, S=67, H=4, K=2, D=20),
    "tile+1": Case(T=65, S=65, H=1, K=1, D=16),
    "full": Case(T=37, S=101, H=4, K=1, causal=False),
    "groups 1": Case(T=40, S=40, H=3, K=3),
    "groups 2": Case(T=40, S=40, H=6, K=3),
    "groups 4": Case(T=40, S=40, H=8, K=2),
    "groups 8": Case(T=40, S=40, H=8, K=1),
    "head dim 64": Case(T=33, S=33, D=64),
    "head dim 80": Case(T=33, S=33, D=80),
    "head dim 96": Case(T=33, S=33, D=96),
    "head dim 128": Case(T=33, S=33, D=128),
    "head dim 256": Case(T=33, S=33, D=256, H=1, K=1),
    "head dim 101": Case(T=33, S=33, D=101),
    "few keys, head dim 256": Case(T=40, S=5, H=3, K=3, D=256, q_offset=1, window=7),
    "documents": Case(B=2, T=97, S=97, cu=DOCUMENTS),
    "documents, full": Case(B=2, T=97, S=97, cu=DOCUMENTS, causal=False),
    "documents, slice of queries": Case(B=2, T=41, S=97, cu=DOCUMENTS, q_offset=37),
    "documents, slice of keys": Case(T=40, S=70, cu=((-60, -3, 40, 200, 200),), q_offset=50),
    "no document": Case(T=40, S=40, cu=((0, 0, 0),)),
    "short documents": Case(T=70, S=70, cu=(tuple(range(0, 61, 3)),)),
    "documents of one token": Case(T=40, S=40, H=4, K=2, D=80, cu=(tuple(range(36)),)),
    "queries before keys": Case(T=40, S=64, q_offset=-30, H=2, K=2),
    "queries after keys": Case(T=40, S=64, q_offset=100),
    "decode": Case(T=1, S=77, q_offset=76),
    "window": Case(T=90, S=90, window=17),
    "window 1": Case(T=70, S=70, window=1),
    "window, full": Case(T=90, S=90, window=9, causal=False),
    "window past keys": Case(T=40, S=64, window=20, q_offset=60),
    "documents, window": Case(B=2, T=97, S=97, cu=DOCUMENTS, window=12),
    "documents, window, full": Case(B=2, T=97, S=97, cu=DOCUMENTS, window=12, causal=False),
    "softcap": Case(T=50, S=50, softcap=3.0),
    "softcap, saturated": Case(T=50, S=50, softcap=0.3),
    "sink": Case(T=50, S=50, H=4, K=2, sink=True),
    "sink, documents": Case(B=2, T=97, S=97, cu=DOCUMENTS, sink=True),
    "everything": Case(B=2, T=60, S=97, cu=DOCUMENTS, q_offset=30, window=25, softcap=5.0, sink=True, H=4, K=2),
    "scale": Case(T=40, S=40, scale=1.7),
    "sharp": Case(T=65, S=65, H=2, K=1, D=200, scale=1.0),
}


@st.composite
def drawn_cases(draw) -> Case:
    S = draw(st.integers(1, 90))
    T = draw(st.integers(1, 90))
    K = draw(st.sampled_from([1, 2]))
    cu = None
    if draw(st.booleans()):
        ends = sorted(draw(st.lists(st.integers(0, S + 5), min_size=1, max_size=6)))
        cu = ((draw(st.integers(-5, 0)), *ends, ends[-1]),)
    return Case(
        T=T, S=S, H=K * draw(st.sampled_from([1, 2, 4, 8])), K=K, D=draw(st.sampled_from([1, 3, 16, 24, 80, 200])),
        cu=cu, causal=draw(st.booleans()), q_offset=draw(st.integers(-20, 80)),
        window=draw(st.none() | st.integers(1, 100)), softcap=draw(st.none() | st.floats(0.5, 30)),
        sink=draw(st.booleans()), seed=draw(st.integers(0, 1000)),
    )  # fmt: skip
