"""What do the processes of an installation cost, and what do they survive?"""
