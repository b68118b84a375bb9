"""Train the CLIP of the built-in world: python -m dfzsl.datasets.shapes.train_clip"""

from dfzsl.datasets.shapes.train_clip import main

if __name__ == "__main__":
    main()
