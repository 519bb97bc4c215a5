"""lightning.Trainer with the GPT2LMHeadModel that transformers_trainer.py trains, fp32."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from text import Blocks, arguments
from torch import Tensor
from transformers_trainer import gpt2


class GPT2(lightning.LightningModule):
    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.model = gpt2(settings)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.model(**batch).loss
        if index % 10 == 0:
            print(f"loss {loss.item():.4f}", flush=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


if __name__ == "__main__":
    shape = arguments(__doc__)
    loader = torch.utils.data.DataLoader(Blocks(shape.text, shape.time), batch_size=shape.batch)
    trainer = lightning.Trainer(max_steps=10**6, accelerator="cpu", gradient_clip_val=1.0, logger=False,
                                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(GPT2(shape).train(), loader)
