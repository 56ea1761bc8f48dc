"""The backbone itself: its plain text, and whether it is still a fresh copy; python eval.py RUN --ask and
--check-backbone call it."""
import copy

import torch

from adapter import MultimodalLLM
from data import Task
from support.files import UserError

PROMPTS = ("Once upon a time", "The capital of France is", "1 + 1 =", "今天天气很好，")


def embed_prompt(llm, tokenizer, task: Task, text: str):
    """A text behind the backbone's own first tokens, (1, T, C)."""
    bos, _, _ = task.wording(llm.config.family).special_ids(tokenizer)
    ids = torch.tensor([bos + tokenizer.encode(text)], device=llm.embed.weight.device)
    return llm.embed(ids)


def ask(net: MultimodalLLM, text: str, new_tokens: int = 100) -> str:
    """The text and how the frozen backbone goes on with it, greedily; the adapter has no part in it."""
    x = embed_prompt(net.llm, net.tokenizer, net.task, text)
    room = net.llm.config.max_len - x.size(1)
    ids = net.llm.generate(x, max(1, min(new_tokens, room)), eos_id=net.eos_id)
    return net.tokenizer.decode(net.tokenizer.encode(text) + ids[0].tolist())


@torch.no_grad()
def fingerprints(llm, tokenizer, task: Task) -> list:
    """The logits at every token of PROMPTS, and checksums over the bits of every tensor."""
    prints = []
    for text in PROMPTS:
        hidden = llm(embed_prompt(llm, tokenizer, task, text))
        prints.append(llm.logits(hidden).cpu())
    return prints + llm.bit_sums()


def check_backbone(net: MultimodalLLM, fresh: list, batch, row) -> str:
    """Answer a batch, take a training step on a batch of one row, which needs little memory, then compare
    the backbone bit by bit with `fresh`, the fingerprints of a copy that never saw an adapter. Raises
    UserError if they differ.

    The step is taken with a copy of the adapter: the net stays as it was.
    """
    net.answer(batch)
    # In training mode, for on a GPU an LSTM has no backward in the other.
    adapter = copy.deepcopy(net.adapter).to(net.device).train()        # .to joins an LSTM's weights again
    twin = MultimodalLLM(net.llm, adapter, net.tokenizer, net.task, net.official)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3)           # the frozen ones too
    twin.loss(row).backward()
    optimizer.step()
    now = fingerprints(net.llm, net.tokenizer, net.task)
    wrong = sum(not torch.equal(a, b) for a, b in zip(now, fresh, strict=True))
    if wrong:
        raise UserError(f"the backbone changed: {wrong} of {len(fresh)} fingerprints are not a fresh copy's")
    n = len(PROMPTS)
    return (f"backbone unchanged: logits of {n} prompts and bits of {len(fresh) - n} "
            f"tensors are a fresh copy's after {len(batch.text)} answers and a training step")
