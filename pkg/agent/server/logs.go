package server

import (
	"net/http"
	"time"

	"meshd.dev/pkg/agent/logs"
	"meshd.dev/pkg/agent/plan"
)

func (s *Server) logs(w http.ResponseWriter, r *http.Request) {
	o, err := logs.ParseOptions(r.URL.Query(), time.Now())
	if err != nil {
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
		return
	}
	ns, pod, name := r.PathValue("ns"), r.PathValue("pod"), r.PathValue("container")
	c, err := s.cfg.Pods.Container(ns, pod, name, o.Previous)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	if c.LogPath == "" {
		http.Error(w, "container "+name+" has no log", http.StatusBadRequest)
		return
	}
	alive := func() bool {
		now, err := s.cfg.Pods.Container(ns, pod, name, false)
		return err == nil && now.ID == c.ID && now.State == plan.Running
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	out := &flushed{w: w, c: http.NewResponseController(w)}
	if o.Follow {
		w.WriteHeader(http.StatusOK)
		_ = out.c.Flush()
	}
	if err := logs.Read(r.Context(), c.LogPath, o, out, alive); err != nil && out.n == 0 && !o.Follow {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

// flushed passes every write on at once.
type flushed struct {
	w http.ResponseWriter
	c *http.ResponseController
	n int
}

func (f *flushed) Write(b []byte) (int, error) {
	n, err := f.w.Write(b)
	f.n += n
	if err != nil {
		return n, err
	}
	return n, f.c.Flush()
}
