"""From messages to token ids and back: chat templates, control tokens, and the rows that training reads."""
