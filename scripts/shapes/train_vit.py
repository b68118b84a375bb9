"""Train the vision transformer of the built-in world: python -m dfzsl.datasets.shapes.train_vit"""

from dfzsl.datasets.shapes.train_vit import main

if __name__ == "__main__":
    main()
