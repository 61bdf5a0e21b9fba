// Command echo is what the tests put into pods: a server that says who it is,
// and that does on request what a test wants to see a pod do: resolve, fetch,
// send a long checked stream to another pod, read and write files, be unwell,
// crash.
//
// Without arguments it serves:
//
//	:8080/tcp  HTTP, see routes
//	:7777/tcp  the far end of a transfer, see transfer.go
//	:7778/udp  answers each datagram with the pod's name
//
// With arguments it is a client for probes and one-shot pods:
//
//	echo fetch URL | resolve NAME | cat FILE | write FILE TEXT | exit CODE
//
// Environment: POD_NAME (else the host name), NODE_NAME, POD_NAMESPACE;
// JOURNAL names a file to which every start appends a line; STOP_DELAY is how
// long it takes its leave after SIGTERM.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "echo:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if len(args) == 0 {
		return serve(ctx, whoAmI())
	}
	arg := func(i int) string {
		if i < len(args) {
			return args[i]
		}
		return ""
	}
	switch args[0] {
	case "fetch":
		return printJSON(fetch(ctx, arg(1), 5*time.Second))
	case "resolve":
		return printJSON(resolve(ctx, arg(1), arg(2), 5*time.Second))
	case "cat":
		b, err := os.ReadFile(arg(1))
		_, _ = os.Stdout.Write(b)
		return err
	case "write":
		return os.WriteFile(arg(1), []byte(arg(2)), 0o644)
	case "exit":
		code, err := strconv.Atoi(arg(1))
		if err == nil {
			os.Exit(code)
		}
		return err
	}
	return errors.New("want fetch URL, resolve NAME [TYPE], cat FILE, write FILE TEXT or exit CODE")
}

// failure is an answer that may say what went wrong.
type failure interface{ failed() error }

// printJSON prints v; the exit status says whether it failed.
func printJSON(v failure) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	fmt.Println(string(b))
	return v.failed()
}
