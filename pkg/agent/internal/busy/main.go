// Command busy is the program in the pods of the agent's tests: a few words a
// step, steps separated by ";", done in order.
//
//	say TEXT | env | cat FILE | write FILE TEXT | need FILE | lines N | sleep MS
//	ip | exit CODE | wait (for SIGTERM) | deaf (to SIGTERM) | http PORT
//
// http answers /file/PATH with the file's content, /env with the environment,
// and /health with 200 while /tmp/sick does not exist. It ends as wait does.
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	var step []string
	for _, word := range append(os.Args[1:], ";") {
		if word != ";" {
			step = append(step, word)
			continue
		}
		if err := do(step); err != nil {
			fmt.Fprintln(os.Stderr, "busy:", err)
			os.Exit(1)
		}
		step = nil
	}
}

func do(step []string) error {
	if len(step) == 0 {
		return nil
	}
	arg := func(i int) string {
		if i < len(step) {
			return step[i]
		}
		return ""
	}
	number, _ := strconv.Atoi(arg(1))
	switch step[0] {
	case "say":
		fmt.Println(strings.Join(step[1:], " "))
	case "env":
		fmt.Println(strings.Join(os.Environ(), "\n"))
	case "cat":
		b, err := os.ReadFile(arg(1))
		fmt.Print(string(b))
		return err
	case "write":
		return os.WriteFile(arg(1), []byte(arg(2)), 0o644)
	case "need":
		_, err := os.Stat(arg(1))
		return err
	case "lines":
		for i := range number {
			fmt.Println("line", i)
		}
	case "sleep":
		time.Sleep(time.Duration(number) * time.Millisecond)
	case "ip":
		addrs, err := net.InterfaceAddrs()
		fmt.Println(addrs)
		return err
	case "exit":
		os.Exit(number)
	case "wait":
		wait()
	case "deaf":
		signal.Ignore(syscall.SIGTERM)
		time.Sleep(time.Hour)
	case "http":
		go serve(arg(1))
		wait()
	default:
		return fmt.Errorf("%q is no step", step[0])
	}
	return nil
}

func wait() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM)
	<-c
	fmt.Println("bye")
}

func serve(port string) {
	http.HandleFunc("/file/", func(w http.ResponseWriter, r *http.Request) {
		b, err := os.ReadFile(strings.TrimPrefix(r.URL.Path, "/file"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		_, _ = w.Write(b)
	})
	http.HandleFunc("/env", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, strings.Join(os.Environ(), "\n"))
	})
	http.HandleFunc("/health", func(w http.ResponseWriter, _ *http.Request) {
		if _, err := os.Stat("/tmp/sick"); err == nil {
			http.Error(w, "sick", http.StatusInternalServerError)
		}
	})
	fmt.Println(http.ListenAndServe(":"+port, nil))
	os.Exit(1)
}
