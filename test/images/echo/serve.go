package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"
)

// Identity is the answer to GET /.
type Identity struct {
	Pod       string    `json:"pod"`
	Node      string    `json:"node"`
	Namespace string    `json:"namespace"`
	Started   time.Time `json:"started"`
	Remote    string    `json:"remote,omitempty"` // whom the server saw asking
}

func whoAmI() Identity {
	id := Identity{Pod: os.Getenv("POD_NAME"), Node: os.Getenv("NODE_NAME"), Namespace: os.Getenv("POD_NAMESPACE"), Started: time.Now()}
	if id.Pod == "" {
		id.Pod, _ = os.Hostname()
	}
	return id
}

// server is one running echo.
type server struct {
	id                 Identity
	unready, unhealthy atomic.Bool
}

func serve(ctx context.Context, id Identity) error {
	if err := journal(id); err != nil {
		return err
	}
	s := &server{id: id}
	udp, err := net.ListenPacket("udp", ":7778")
	if err != nil {
		return err
	}
	go s.answerDatagrams(udp)
	tcp, err := net.Listen("tcp", ":7777")
	if err != nil {
		return err
	}
	go receiveTransfers(tcp)
	web := &http.Server{Addr: ":8080", Handler: s.routes()}
	ended := make(chan error, 1)
	go func() { ended <- web.ListenAndServe() }()
	fmt.Printf("serving as pod %s on node %s\n", id.Pod, id.Node)
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	fmt.Println("told to end")
	s.unready.Store(true)
	if d, err := time.ParseDuration(os.Getenv("STOP_DELAY")); err == nil {
		time.Sleep(d)
	}
	return nil
}

// journal notes this start in the file JOURNAL names.
func journal(id Identity) error {
	path := os.Getenv("JOURNAL")
	if path == "" {
		return nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "%s started as %s on %s\n", id.Started.UTC().Format(time.RFC3339Nano), id.Pod, id.Node)
	return errors.Join(err, f.Sync(), f.Close())
}

func (s *server) answerDatagrams(conn net.PacketConn) {
	buf := make([]byte, 1<<16)
	for {
		_, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		_, _ = conn.WriteTo([]byte(s.id.Pod), from)
	}
}

func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		id := s.id
		id.Remote = r.RemoteAddr
		writeJSON(w, id)
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { well(w, !s.unhealthy.Load()) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { well(w, !s.unready.Load()) })
	mux.HandleFunc("POST /set", s.set)
	mux.HandleFunc("POST /crash", func(_ http.ResponseWriter, r *http.Request) {
		code, _ := strconv.Atoi(r.FormValue("code"))
		fmt.Println("told to crash with", code)
		os.Exit(code)
	})
	mux.HandleFunc("GET /env", func(w http.ResponseWriter, r *http.Request) {
		value, ok := os.LookupEnv(r.FormValue("name"))
		if !ok {
			http.Error(w, "not set", http.StatusNotFound)
			return
		}
		_, _ = io.WriteString(w, value)
	})
	mux.HandleFunc("GET /file", func(w http.ResponseWriter, r *http.Request) {
		b, err := os.ReadFile(r.FormValue("path"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		_, _ = w.Write(b)
	})
	mux.HandleFunc("PUT /file", putFile)
	mux.HandleFunc("GET /fetch", func(w http.ResponseWriter, r *http.Request) {
		writeJSON(w, fetch(r.Context(), r.FormValue("url"), timeout(r)))
	})
	mux.HandleFunc("GET /resolve", func(w http.ResponseWriter, r *http.Request) {
		writeJSON(w, resolve(r.Context(), r.FormValue("name"), r.FormValue("type"), timeout(r)))
	})
	mux.HandleFunc("GET /transfer", sendTransfer)
	mux.HandleFunc("POST /transfer/stop", stopTransfer)
	return mux
}

// set changes what the probes answer: ready=BOOL, healthy=BOOL.
func (s *server) set(w http.ResponseWriter, r *http.Request) {
	for name, bad := range map[string]*atomic.Bool{"ready": &s.unready, "healthy": &s.unhealthy} {
		if v := r.FormValue(name); v != "" {
			good, err := strconv.ParseBool(v)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			bad.Store(!good)
		}
	}
}

func putFile(w http.ResponseWriter, r *http.Request) {
	path := r.FormValue("path")
	b, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o755)
	}
	if err == nil {
		err = os.WriteFile(path, b, 0o644)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

func well(w http.ResponseWriter, yes bool) {
	if !yes {
		http.Error(w, "told to be unwell", http.StatusServiceUnavailable)
		return
	}
	_, _ = io.WriteString(w, "ok\n")
}

// timeout is the request's own, or five seconds.
func timeout(r *http.Request) time.Duration {
	if d, err := time.ParseDuration(r.FormValue("timeout")); err == nil {
		return d
	}
	return 5 * time.Second
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}
