package netlab

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// The names under which the package starts its own program again (argv[0]).
const (
	powerName = "netlab-power" // puts a machine's first process where it belongs
	bootName  = "netlab-init"  // is a machine's first process
	enterName = "netlab-enter" // runs a command inside a machine
)

// Init does the work of a helper and does not return if this process was
// started as one; otherwise it does nothing.
func Init() {
	if len(os.Args) != 2 {
		return
	}
	var work func(string) error
	switch os.Args[0] {
	case powerName:
		work = power
	case bootName:
		work = boot
	case enterName:
		work = enter
	default:
		return
	}
	// What the caller was handed open stays with the helper: a machine that
	// held the far end of a pipe would keep its reader waiting for ever.
	err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	if err == nil {
		err = work(os.Args[1])
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
		os.Exit(125)
	}
	os.Exit(0)
}

// helper is this program again, under the given name; order is its one argument.
func helper(name string, order any) *exec.Cmd {
	b, err := json.Marshal(order)
	if err != nil {
		panic(err) // an order is plain data of ours
	}
	return &exec.Cmd{Path: "/proc/self/exe", Args: []string{name, string(b)}}
}
