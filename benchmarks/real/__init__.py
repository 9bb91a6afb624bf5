"""What do the defaults reach on a real model, on everyday tasks of few examples?"""
