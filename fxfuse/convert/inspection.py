"""stub"""
def inspect_pt2(path, *, allow_pickle=False): pass
