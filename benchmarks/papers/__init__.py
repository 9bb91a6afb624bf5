"""Which order do the papers' own tables have through this service, at a small scale?"""
