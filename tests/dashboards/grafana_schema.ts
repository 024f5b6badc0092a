// What a dashboard of stats and time series over Prometheus is, by Grafana's own types; reduce_schema.py says how
// grafana_schema.json is made of it.
import * as raw from './node_modules/@grafana/schema/dist/types/raw/dashboard/x/types.gen';
import * as stat from './node_modules/@grafana/schema/dist/types/raw/composable/stat/panelcfg/x/types.gen';
import * as timeseries from './node_modules/@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/types.gen';

interface PrometheusQuery {
  refId: string;
  datasource: raw.DataSourceRef;
  expr: string;
  legendFormat: string;
}
interface Of<Kind, Options, Custom> extends Omit<raw.Panel, 'type' | 'options' | 'fieldConfig' | 'targets'> {
  type: Kind;
  options: Options;
  fieldConfig: { defaults: Omit<raw.FieldConfig, 'custom'> & { custom?: Custom }; overrides: [] };
  targets: PrometheusQuery[];
}
type Panel = Of<'stat', stat.Options, {}> | Of<'timeseries', timeseries.Options, timeseries.FieldConfig>;
interface Annotation extends raw.AnnotationQuery {
  expr?: string;
  titleFormat?: string;
}
interface Variable extends raw.VariableModel {
  definition?: string;
}
export interface Dashboard extends Omit<raw.Dashboard, 'panels' | 'annotations' | 'templating'> {
  panels: Array<Panel | raw.RowPanel>;
  annotations: { list: Annotation[] };
  templating: { list: Variable[] };
}
