"""How well are texts classified: a head alone on the base model, against cores and a head."""
