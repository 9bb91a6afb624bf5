"""What does the host do between two computations of the engine?"""
