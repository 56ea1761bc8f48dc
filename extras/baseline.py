"""The simplest baseline: the frozen backbone by its prompt alone; python train.py --prompt-alone calls it."""
import torch.nn as nn

from adapter import AdapterConfig, MultimodalLLM
from data import Split, Task
from eval import alarms, evaluate_all, side_by_side

class NoTokens(nn.Module):
    """In the adapter's place: nothing stands in front of the text."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config

    def forward(self, text, audio, audio_len, video, video_len):
        """As MSEAdapter.forward -> (B, 0, C)."""
        return text.new_zeros(len(text), 0, text.size(1))

def prompt_alone(llm, tokenizer, task: Task, split: Split, settings) -> str:
    """What a split scores without an adapter and without training, a column per way of decoding."""
    config = AdapterConfig(llm.config.dim, 0, 0, 0, 0, pseudo_tokens=0)
    net = MultimodalLLM(llm, NoTokens(config), tokenizer, task, settings.official)
    results = evaluate_all(net, split, settings.eval_batch)
    notes = [f"{name}: {alarm}" for name, result in results.items() for alarm in alarms(result)]
    return "\n".join([side_by_side(results), *notes])
