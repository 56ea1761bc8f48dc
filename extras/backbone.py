"""The backbone itself: its plain text, and whether it is still a fresh copy; python eval.py RUN --ask and
--check-backbone call it."""
import torch

from adapter import MultimodalLLM
from data import Task, special_ids

PROMPTS = ("Once upon a time", "The capital of France is", "1 + 1 =", "今天天气很好，")

def embed_prompt(llm, tokenizer, task: Task, text: str):
    """A text behind the backbone's own first tokens, (1, T, C)."""
    bos, _, _ = special_ids(task.wording(llm.config.family), tokenizer)
    return llm.embed(torch.tensor([bos + tokenizer.encode(text)], device=llm.embed.weight.device))

def ask(net: MultimodalLLM, text: str, new_tokens: int = 100) -> str:
    """How the frozen backbone goes on with a text, greedily; the adapter has no part in it."""
    x = embed_prompt(net.llm, net.tokenizer, net.task, text)
    n = max(1, min(new_tokens, net.llm.config.max_len - x.size(1)))
    return net.tokenizer.decode(net.llm.generate(x, n, eos_id=net.eos_id)[0].tolist())

@torch.no_grad()
def fingerprints(llm, tokenizer, task: Task) -> list:
    """The logits at every token of PROMPTS, and a checksum over the bits of every tensor."""
    prompts = [embed_prompt(llm, tokenizer, task, text) for text in PROMPTS]
    logits = [llm.logits(llm(x)).cpu() for x in prompts]
    return logits + [p.view(torch.int16).sum().cpu() for p in llm.parameters()]

def check_backbone(net: MultimodalLLM, fresh: list, batch) -> str:
    """Answer a batch, take a training step on it, then compare the backbone bit by bit with `fresh`, the
    fingerprints of a copy that never saw an adapter. Raises ValueError if they differ."""
    net.answer(batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)            # the frozen ones too
    net.loss(batch).backward()
    optimizer.step()
    found = fingerprints(net.llm, net.tokenizer, net.task)
    wrong = sum(not torch.equal(now, before) for now, before in zip(found, fresh, strict=True))
    if wrong:
        raise ValueError(f"the backbone changed: {wrong} of {len(fresh)} fingerprints are not a fresh copy's")
    return (f"backbone unchanged: logits of {len(PROMPTS)} prompts and bits of {len(fresh) - len(PROMPTS)} "
            f"tensors are a fresh copy's after {len(batch.text)} answers and a training step")

