"""The search for a learning rate: candidates trained together, judged on examples that they do not see."""
