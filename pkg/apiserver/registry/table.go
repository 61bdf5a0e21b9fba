package registry

import (
	"context"
	"maps"
	"net"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/duration"
)

// printer shows objects of one kind as rows.
type printer struct {
	columns []metav1.TableColumnDefinition
	cells   func(obj runtime.Object) []any
}

// prints makes a printer. Headings are divided by commas; those behind a bar
// are shown with -o wide only, and a trailing # marks a number.
func prints[T any](headings string, cells func(*T) []any) *printer {
	p := &printer{cells: func(obj runtime.Object) []any { return cells(any(obj).(*T)) }}
	narrow, wide, _ := strings.Cut(headings, "|")
	for priority, names := range []string{narrow, wide} {
		if names == "" {
			continue
		}
		for name := range strings.SplitSeq(names, ",") {
			c := metav1.TableColumnDefinition{Name: strings.TrimSuffix(name, "#"), Type: "string", Priority: int32(priority)}
			if c.Name != name {
				c.Type = "integer"
			}
			if c.Name == "Name" && priority == 0 {
				c.Format = "name"
			}
			c.Description = c.Name
			p.columns = append(p.columns, c)
		}
	}
	return p
}

// plain is for kinds that have nothing else to show.
var plain = &printer{
	columns: prints("Name,Age", func(*metav1.Status) []any { return nil }).columns,
	cells: func(obj runtime.Object) []any {
		m, err := meta.Accessor(obj)
		if err != nil {
			return []any{"<unknown>", "<unknown>"}
		}
		return []any{m.GetName(), age(m.GetCreationTimestamp())}
	},
}

// ConvertToTable implements rest.TableConvertor.
func (p *printer) ConvertToTable(_ context.Context, obj, options runtime.Object) (*metav1.Table, error) {
	out := &metav1.Table{}
	if opt, ok := options.(*metav1.TableOptions); !ok || opt == nil || !opt.NoHeaders {
		out.ColumnDefinitions = p.columns
	}
	row := func(item runtime.Object) error {
		out.Rows = append(out.Rows, metav1.TableRow{Cells: p.cells(item), Object: runtime.RawExtension{Object: item}})
		return nil
	}
	if list, err := meta.ListAccessor(obj); err == nil && meta.IsListType(obj) {
		out.ResourceVersion, out.Continue = list.GetResourceVersion(), list.GetContinue()
		out.RemainingItemCount = list.GetRemainingItemCount()
		return out, meta.EachListItem(obj, row)
	}
	if m, err := meta.CommonAccessor(obj); err == nil {
		out.ResourceVersion = m.GetResourceVersion()
	}
	return out, row(obj)
}

func age(t metav1.Time) string {
	if t.IsZero() {
		return "<unknown>"
	}
	return duration.HumanDuration(time.Since(t.Time))
}

// orNone is what kubectl shows for an empty cell.
func orNone(s string) string {
	if s == "" {
		return "<none>"
	}
	return s
}

// few joins at most three of items.
func few(items []string) string {
	if len(items) > 3 {
		return strings.Join(items[:3], ",") + " + " + itoa(len(items)-3) + " more..."
	}
	return orNone(strings.Join(items, ","))
}

func ageOf(t time.Time) string { return age(metav1.Time{Time: t}) }

func hostPort(host string, port int32) string { return net.JoinHostPort(host, itoa(port)) }

func sorted(s []string) []string { slices.Sort(s); return s }

func labelKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
