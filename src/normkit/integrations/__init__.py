"""Callbacks and writers for other training programs, one module per package.

| module | for |
| --- | --- |
| `normkit.integrations.lightning` | a callback of Lightning's `Trainer` |
| `normkit.integrations.lightning_sync` | synchronized layers in its `Trainer` |
| `normkit.integrations.transformers` | a callback of Hugging Face's `Trainer` |
| `normkit.integrations.ultralytics` | callbacks of Ultralytics' trainers |
| `normkit.integrations.wandb`, `mlflow` | the record of a training run as metrics |

Each imports its package, and nothing here imports one of them. timm's and accelerate's
objects need no module: the verbs take them as they are.
"""
