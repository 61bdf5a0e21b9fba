// Command mesh is the CNI plugin of meshd: see README.md.
package main

import (
	"os"

	"meshd.dev/pkg/cni"
)

func main() { os.Exit(cni.Main("CNI plugin mesh")) }
